"""Everything that the Ascend backend uses is in the vendor's wheel, and takes what it is given.

The wheel is read, not imported: CANN is not here. This cannot show that a device does what the names say.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eplb_backends.ascend
from eplb_backends.accelerator import routing
from eplb_backends.ascend import nz_format, token_counts, update_expert
from eplb_backends.cpu.streams import SerialStreams
from tests.ascend.wheel import Wheel
from tests.unit.test_device_symbols import OF_ITS_CLASSES, OF_TENSORS, OF_THE_MODULE

PLAIN_TENSOR = torch.zeros(1)

OF_TORCH_NPU: dict[str, tuple[tuple[object, ...], dict[str, object]]] = {
    "get_npu_format": ((PLAIN_TENSOR,), {}),
    "get_storage_size": ((PLAIN_TENSOR,), {}),
    "npu_format_cast": ((PLAIN_TENSOR, 29), {}),
    "npu_moe_update_expert": ((PLAIN_TENSOR, PLAIN_TENSOR), {"balance_mode": 1}),
}
"""Operators and arguments, as the backend calls them."""


def test_the_wheel_is_for_the_torch_of_these_tests(wheel: Wheel) -> None:
    release = torch.__version__.partition("+")[0]
    assert wheel.metadata["Version"] == release
    assert f"torch=={release}.*" in wheel.metadata.get_all("Requires-Dist", [])


# --- streams, events, devices ---


@pytest.mark.parametrize("name", OF_THE_MODULE)
def test_torch_npu_has_what_is_called_of_a_device_module(wheel: Wheel, name: str) -> None:
    arguments, options = OF_THE_MODULE[name]
    assert name in wheel.names_of("npu/__init__.py")
    signature = wheel.signature("npu", name)
    of_class = {"Stream", "Event", "device"}
    signature.bind(*([None] if name in of_class else []), *arguments, **options)


@pytest.mark.parametrize(("kind", "method"), OF_ITS_CLASSES)
def test_its_streams_and_events_have_what_is_called(wheel: Wheel, kind: str, method: str) -> None:
    wheel.signature("npu", kind, method).bind(None, *OF_ITS_CLASSES[kind, method])


@pytest.mark.parametrize("name", ["device", "StreamContext"])
def test_devices_and_streams_are_entered_and_left(wheel: Wheel, name: str) -> None:
    for method in ("__enter__", "__exit__"):
        wheel.signature("npu", name, method)


@pytest.mark.parametrize("name", [*OF_TENSORS, "_pin_memory"])
def test_tensors_on_the_device_have_what_is_called(wheel: Wheel, name: str) -> None:
    assert name in wheel.operators


# --- operators ---


@pytest.mark.parametrize("name", OF_TORCH_NPU)
def test_operators_take_what_they_are_given(wheel: Wheel, name: str) -> None:
    arguments, options = OF_TORCH_NPU[name]
    for schema in (wheel.registered(name), torch._C.parse_schema(wheel.operators[name])):
        parameters = [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_ONLY,
                default=None if argument.has_default_value() else inspect.Parameter.empty,
            )
            for argument in schema.arguments
        ]
        inspect.Signature(parameters).bind(*arguments, **options)


def test_operators_give_what_is_taken(wheel: Wheel) -> None:
    returned = {name: [str(value.type) for value in wheel.registered(name).returns] for name in OF_TORCH_NPU}
    assert returned == {
        "get_npu_format": ["int"],
        "get_storage_size": ["int"],
        "npu_format_cast": ["Tensor"],
        "npu_moe_update_expert": ["Tensor", "Tensor"],
    }


@pytest.mark.parametrize("name", OF_TORCH_NPU)
def test_operators_are_names_of_torch_npu(wheel: Wheel, name: str) -> None:
    assigned = {
        ast.unparse(target)
        for node in wheel.module("utils/custom_ops.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == f"torch.ops.npu.{name}"
        for target in node.targets
    }
    assert assigned == {f"torch_npu.{name}"}


def test_nothing_else_of_torch_npu_is_used() -> None:
    """So that the lists above are complete."""
    known = {*OF_TORCH_NPU, "npu", "_C", "device_count"}
    found = {name for tree in _sources() for name in _attributes_of_torch_npu(tree)}
    assert found <= known
    assert {"get_npu_format", "get_storage_size", "npu_format_cast", "npu", "_C"} <= found


def test_both_kinds_of_group_lists_are_those_of_the_operators(wheel: Wheel) -> None:
    for operator, argument in (
        ("npu_moe_distribute_dispatch", "expert_token_nums_type"),
        ("npu_moe_distribute_dispatch_v2", "expert_token_nums_type"),
        ("npu_moe_init_routing_v2", "expert_tokens_num_type"),
        ("npu_grouped_matmul", "group_list_type"),
    ):
        schema = wheel.registered(operator)
        assert argument in [given.name for given in schema.arguments]


class Operators(TorchDispatchMode):
    """Notes the operators that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch._ops.OpOverload] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def _run_all() -> set[torch._ops.OpOverload]:
    """Whatever the backend does on the device in plain formats."""
    streams, layout = SerialStreams(), nz_format.DenseLayout()
    table, counts = (
        torch.tensor([[0, -1], [1, 2]], dtype=torch.int32),
        torch.tensor([1, 2], dtype=torch.int32),
    )
    ids, load = torch.tensor([[0, 1], [-1, 1]]), torch.zeros(3, dtype=torch.int64)
    weights = torch.zeros(4, 6).half()
    with Operators() as operators:
        routing.map_and_record(ids, table, counts, load, 1)
        update_expert.map_and_record(_first_replica, ids, table, counts, load, 1)
        token_counts.add_to_load(load, torch.tensor([1, 2], dtype=torch.int32), 0, first_slot=1)
        for tensor in (weights, weights.T):
            layout.to_send(streams, tensor)
            layout.fill(streams, tensor, layout.to_fill(tensor))
        torch.empty_like(weights[0]), weights.clone()
    return operators.seen


def _first_replica(
    ids: torch.Tensor, table: torch.Tensor, *, balance_mode: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return ids, ids


def test_torch_s_operators_have_kernels_for_the_device(wheel: Wheel) -> None:
    seen = _run_all()
    assert {operator.name() for operator in seen} >= {"aten::scatter_add_", "aten::gather", "aten::copy_"}
    lacking = [operator.name() for operator in seen if not _has_kernel(operator, wheel)]
    assert not lacking


def _has_kernel(operator: torch._ops.OpOverload, wheel: Wheel) -> bool:
    """One of the device's own, for it, its out form or its in-place form; or it only makes a view."""
    name = operator.name().removeprefix("aten::")
    packet, _, overload = name.partition(".")
    own = [packet, name, f"{packet}.out", f"{name}_out", f"{packet}_", f"{packet}_.{overload}"]
    return name in VIEWS or any(form in wheel.operators for form in own)


VIEWS = {"detach", "lift_fresh", "permute", "select.int", "slice.Tensor", "unsqueeze"}


# --- formats ---


def test_every_format_of_the_wheel_is_known_to_be_plain_or_not(wheel: Wheel) -> None:
    (formats,) = (
        node
        for node in wheel.module("npu/_format.py").body
        if isinstance(node, ast.ClassDef) and node.name == "Format"
    )
    numbers = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in formats.body
        if isinstance(node, ast.Assign)
    }
    internal = {name for name, number in numbers.items() if number not in nz_format.PLAIN_FORMATS}
    assert internal == {name for name in numbers if name.startswith("FRACTAL") or "C1HWC0" in name}
    assert (numbers["ND"], numbers["FRACTAL_NZ"]) == (2, 29)
    assert set(numbers.values()) >= nz_format.PLAIN_FORMATS


def test_the_library_refuses_what_the_backend_refuses(wheel: Wheel) -> None:
    assert b"For a tensor of internal format, it's storage_offset must be 0" in wheel.library
    assert b"Cannot create tensor with internal format while allow_internal_format=False" in wheel.library


def _sources() -> Iterator[ast.Module]:
    folder = Path(eplb_backends.ascend.__path__[0])
    for path in folder.glob("*.py"):
        yield ast.parse(path.read_text(encoding="utf-8"))


def _attributes_of_torch_npu(tree: ast.Module) -> Iterator[str]:
    """Names behind `torch_npu`, `torch_npu()`, `_torch_npu()`, or a variable `module` that holds it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder = node.value.func if isinstance(node.value, ast.Call) else node.value
            if ast.unparse(holder).rpartition(".")[2] in ("torch_npu", "_torch_npu", "module"):
                yield node.attr
