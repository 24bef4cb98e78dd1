"""What backends use of torch's device modules is there in the installed torch, and takes what it is given.

This cannot show that a device does what the names say.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import eplb_backends.accelerator.streams as streams_module
import eplb_backends.cuda.backend as cuda_module
import eplb_backends.xpu.backend as xpu_module

MODULES = [torch.cuda, torch.xpu]

OF_THE_MODULE: dict[str, tuple[tuple[object, ...], dict[str, object]]] = {
    "current_device": ((), {}),
    "device": ((0,), {}),
    "current_stream": ((), {}),
    "stream": ((None,), {}),
    "is_current_stream_capturing": ((), {}),
    "Stream": ((0,), {}),
    "Event": ((), {"enable_timing": True}),
    "device_count": ((), {}),
}
"""Name and arguments, as the backends call it."""

OF_ITS_CLASSES: dict[tuple[str, str], tuple[object, ...]] = {
    ("Stream", "wait_event"): (None,),
    ("Event", "record"): (None,),
    ("Event", "query"): (),
    ("Event", "elapsed_time"): (None,),
}

OF_TENSORS = ("record_stream", "is_pinned", "copy_")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", OF_THE_MODULE)
def test_a_module_has_what_is_called(module: ModuleType, name: str) -> None:
    arguments, options = OF_THE_MODULE[name]
    _signature(getattr(module, name)).bind(*arguments, **options)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("kind", "method"), OF_ITS_CLASSES)
def test_streams_and_events_have_what_is_called(module: ModuleType, kind: str, method: str) -> None:
    _signature(getattr(getattr(module, kind), method)).bind(None, *OF_ITS_CLASSES[kind, method])


@pytest.mark.parametrize("name", OF_TENSORS)
def test_tensors_have_what_is_called(name: str) -> None:
    assert callable(getattr(torch.Tensor, name))


def test_versions_and_builds_can_be_asked_for() -> None:
    assert isinstance(torch.backends.cuda.is_built(), bool)
    assert {"cuda", "hip"} <= set(dir(torch.version))


def test_nothing_else_is_used() -> None:
    used = _attributes_of(streams_module, "module") | _attributes_of(streams_module, "_module")
    for module, name in ((cuda_module, "cuda"), (xpu_module, "xpu")):
        used |= _attributes_of(module, name)
    assert used - {"is_built"} == set(OF_THE_MODULE)  # torch.backends.cuda.is_built


def test_the_protocols_name_what_is_used() -> None:
    described = {name for name in vars(streams_module.DeviceModule) if not name.startswith("_")}
    assert described == set(OF_THE_MODULE) - {"device_count"}
    for kind, protocol in (("Stream", streams_module.DeviceStream), ("Event", streams_module.DeviceEvent)):
        methods = {name for name in vars(protocol) if not name.startswith("_")}
        assert methods == {method for owner, method in OF_ITS_CLASSES if owner == kind}


def _attributes_of(module: ModuleType, owner: str) -> set[str]:
    """Attributes that a module's source takes of anything called `owner`."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and _last_name(node.value) == owner
    }


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _signature(function: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(function)
