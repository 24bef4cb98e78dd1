"""What the Ascend backend has to refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.distributed import HashStore

from eplb_backends.accelerator import TorchStreams
from eplb_backends.ascend import AscendBackend, environment
from eplb_backends.ascend.hccl_group import BLOCKING_WAIT
from eplb_backends.ascend.nz_format import split_stacked
from tests.ascend.over_stub.swaps import SLOTS, to_nz, values_of

Attempt = tuple[str, str, Callable[[], object]]
"""What is tried, words of its refusal, and how."""

NO_MEMORY = "no memory of its own"


class NoCopies(TorchStreams):
    """A device is lost once it was asked for some of the copies that the backend refuses."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...


def refusals(rank: int) -> list[str]:
    """What the backend did not refuse, or in other words."""
    torch.npu.set_device(rank)
    torch.npu.config.allow_internal_format = True
    return [
        fault
        for attempts in (_views, _stacks, _formats, _options)
        for attempt in attempts(AscendBackend(NoCopies(torch.npu)))
        if (fault := _fault(*attempt))
    ]


def _fault(what: str, words: str, action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return "" if words in str(error) else f"{what}: {error}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"
    return f"{what}: not refused"


def _views(backend: AscendBackend) -> Iterator[Attempt]:
    layout, streams = backend.layout, backend.streams
    weight = to_nz(values_of(0, 0, 0))
    for name, view in (("a slice", weight[16:]), ("the first rows", weight[:16])):
        yield f"{name} is sent", NO_MEMORY, lambda view=view: layout.to_send(streams, view)
        yield f"{name} is filled", NO_MEMORY, lambda view=view: layout.to_fill(view)
        yield f"{name} is enqueued", NO_MEMORY, lambda view=view: layout.as_enqueued(view)
    with torch.inference_mode():  # where a view does not know what it is a view of
        tall = to_nz(torch.zeros(300, 50, dtype=torch.float16))
        square = to_nz(torch.zeros(32, 32, dtype=torch.float16))
        unknown = {"rows behind others": square[16:], "a transposed": square.t(), "a few rows": tall[:16]}
    for name, view in unknown.items():
        yield f"{name} is sent without a base", NO_MEMORY, lambda view=view: layout.to_send(streams, view)


def _stacks(backend: AscendBackend) -> Iterator[Attempt]:
    stack = to_nz(torch.stack([values_of(0, 0, slot) for slot in range(SLOTS)]))
    yield "a stack is staged", "split_stacked", lambda: backend.allocate_staging(stack, 1)
    yield "experts of a stack are staged", NO_MEMORY, lambda: backend.allocate_staging(list(stack), 1)
    yield "a part of a stack is split", NO_MEMORY, lambda: split_stacked(stack[1:])


def _formats(backend: AscendBackend) -> Iterator[Attempt]:
    plain, weight = values_of(0, 0, 0).npu(), to_nz(values_of(0, 0, 0))
    # As many stored elements as the weight has, and more.
    same_size, larger = torch.zeros(32, 64).half().npu(), to_nz(torch.zeros(48, 50).half())
    yield "plain and NZ are mixed", "experts of one", lambda: backend.allocate_staging([weight, plain], 1)
    yield "plain goes into NZ", "ACL format", lambda: backend.swap_in([weight], [0], [plain], [0])
    yield "as much plain goes into NZ", "ACL format", lambda: backend.swap_in([weight], [0], [same_size], [0])
    yield "NZ goes into plain", "ACL format", lambda: backend.swap_in([plain], [0], [weight], [0])
    yield "more goes into NZ", "stored elements", lambda: backend.swap_in([weight], [0], [larger], [0])
    stack = to_nz(torch.zeros(2, 30, 50, dtype=torch.float16))
    octets = backend.layout.to_fill(weight)
    with mock.patch.object(environment.torch_npu(), "npu_format_cast", lambda *given: larger):
        yield (
            "what came is larger",
            "stored elements",
            lambda: backend.layout.fill(backend.streams, weight, octets),
        )
    with _internal_format_off():
        yield "staging is left plain", "allow_internal", lambda: backend.allocate_staging([weight], 1)
        yield (
            "a stack is split into plain",
            "allow_internal",
            lambda: split_stacked(stack),
        )
        yield (
            "what came is left plain",
            "allow_internal",
            lambda: backend.layout.fill(backend.streams, weight, octets),
        )


@contextmanager
def _internal_format_off() -> Iterator[None]:
    torch.npu.config.allow_internal_format = False
    try:
        yield
    finally:
        torch.npu.config.allow_internal_format = True


def _options(backend: AscendBackend) -> Iterator[Attempt]:
    for name, value, words in (
        ("hccl_bufer_size", 77, "the nearest is 'hccl_buffer_size'"),
        ("hccl_buffer_size", 0, "from 1 to"),
        ("hccl_op_expansion_mode", 4, "0 to 3"),
        ("hccl_exec_timeout", "90", "expected an integer"),
        ("qos_traffic_class", 6, "a multiple of 4"),
        ("hccl_algo", 7, "expected text"),
        ("hccl_algo", "", "expected text"),
        ("hccl_retry_enable", "x" * 50, "1 to 49 bytes"),
    ):
        options = {name: value}
        yield (
            f"{name}={value!r}",
            words,
            lambda options=options: AscendBackend(transport="collective", hccl_options=options),
        )
    impatient = AscendBackend(transport="collective", hccl_options={"hccl_exec_timeout": 30})
    yield (
        "HCCL gives up first",
        "hccl_exec_timeout is 30 s",
        lambda: impatient.attach(HashStore(), 0, 2, 30.0),
    )
    with mock.patch.dict("os.environ", {"HCCL_EXEC_TIMEOUT": "20"}):
        usual = AscendBackend(transport="collective")
        yield (
            "HCCL gives up first by the environment",
            "HCCL_EXEC_TIMEOUT is 20 s",
            lambda: usual.attach(HashStore(), 0, 2, 30.0),
        )
    yield (
        "options without HCCL",
        "no effect",
        lambda: AscendBackend(transport="host", hccl_options={"hccl_buffer_size": 77}),
    )
    yield "an unknown routing", "no routing", lambda: AscendBackend(routing="oprator")
    for variable in BLOCKING_WAIT:
        with mock.patch.dict("os.environ", {variable: "1"}):
            yield f"{variable}=1", variable, lambda: AscendBackend(transport="collective")
