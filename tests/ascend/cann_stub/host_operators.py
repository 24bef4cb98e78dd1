"""Runs torch's operators for `npu` tensors by its own CPU kernels, on the stream that they were called on.

torch_npu has kernels for them that call hundreds of the vendor's functions. Here their place is taken by one
for all: it finds the shape of the result, takes memory for it, and puts the CPU's kernel on the stream, where
it runs later, on the same memory, as that is host memory. So an operator reads what is there when the stream
gets to it. Operators whose result is a number or has a length that depends on values wait for the stream.

`register` is called when torch is imported, through torch's entry points for devices.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import TypeAlias

import torch

DEFERRED = [
    "abs", "add", "add_", "all", "any", "arange", "argmax", "argsort", "bitwise_and", "bitwise_and_",
    "bitwise_xor", "bitwise_xor_", "bmm", "cat", "cos", "cumsum", "div", "div_", "embedding", "eq", "exp",
    "flip", "floor_divide", "gather", "ge", "gt", "index", "index_copy", "index_copy_", "index_put_",
    "_index_put_impl_", "index_select", "le", "__rshift__", "logical_and", "logical_not", "logical_or", "lt",
    "masked_fill", "masked_fill_", "max", "maximum", "mean", "min", "minimum", "mm", "mul", "mul_", "ne",
    "neg", "pow", "remainder", "repeat", "rsqrt", "rsub", "scaled_dot_product_attention", "scatter_add",
    "scatter_add_", "sigmoid", "silu", "sin", "_softmax", "sort", "sqrt", "stack", "sub", "sub_", "sum",
    "topk", "where",
]  # fmt: skip
"""With all their overloads."""

AWAITED = ["bincount", "equal", "nonzero"]
"""Those whose result's shape depends on values."""

_SWITCH_S = 2e-5
"""A stream's thread needs the interpreter lock for every operator: it should not wait long for it."""

_Kind: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], torch.dtype]"
"""Shape, strides and type."""

_known_kinds: dict[object, list[_Kind]] = {}
_numbers = itertools.count()
_waiting: dict[int, Callable[[], object]] = {}


def register() -> None:
    """Put the kernels in the place of torch_npu's."""
    import torch_npu  # noqa: F401  # registers its own first

    sys.setswitchinterval(_SWITCH_S)
    library = _library()
    for names, run in ((DEFERRED, _defer), (AWAITED, _await)):
        for operator in (operator for name in names for operator in _overloads(name)):
            library.impl(operator.name(), partial(run, operator), allow_override=True)


@cache
def _library() -> torch.library.Library:
    return torch.library.Library("aten", "IMPL", "PrivateUse1")


def _overloads(name: str) -> list[torch._ops.OpOverload]:
    """Those that torch_npu has a kernel of its own for."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return [operator for operator in overloads if _is_of_the_device(operator.name())]


def _is_of_the_device(name: str) -> bool:
    if name not in torch._C._dispatch_get_all_op_names():  # an overload that only TorchScript has
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1")


def _defer(operator: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    host_args = [_map_tensors(_on_host, value) for value in args]
    host_kwargs = {name: _map_tensors(_on_host, value) for name, value in kwargs.items()}
    if "device" in kwargs:
        host_kwargs["device"] = torch.device("cpu")
    if operator._schema.is_mutable:
        _launch(lambda: operator(*host_args, **host_kwargs))
        return _written(operator, args, kwargs)
    try:
        kinds = _result_kinds(operator, args, kwargs)
    except NotImplementedError:  # an index by a mask, whose length depends on values
        return _await(operator, *args, **kwargs)
    results = [
        torch.empty_strided(shape, stride, dtype=dtype, device="npu") for shape, stride, dtype in kinds
    ]
    targets = [_on_host(result) for result in results]
    _launch(lambda: _store(targets, operator(*host_args, **host_kwargs)))
    return results[0] if len(operator._schema.returns) == 1 else tuple(results)


def _map_tensors(function: Callable[[torch.Tensor], object], value: object) -> object:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(function, item) for item in value)
    return value


def _await(operator: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    torch.npu.current_stream().synchronize()
    host_kwargs = {name: _map_tensors(_on_host, value) for name, value in kwargs.items()}
    result = operator(*(_map_tensors(_on_host, value) for value in args), **host_kwargs)
    return result.to("npu") if isinstance(result, torch.Tensor) else result


def _written(operator: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """The arguments that an operator writes to, which are what it returns."""
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    written = [given[argument.name] for argument in operator._schema.arguments if argument.is_write]
    return written[0] if len(written) == 1 else tuple(written)


def _store(targets: list[torch.Tensor], values: object) -> None:
    for target, value in zip(targets, values if isinstance(values, tuple) else [values], strict=True):
        target.copy_(value)


def _result_kinds(
    operator: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[_Kind]:
    """Found once for arguments of the same kinds: it takes longer than the operator."""
    key = operator, _key(args), _key(tuple(kwargs.items()))
    if key not in _known_kinds:
        _known_kinds[key] = _find_result_kinds(operator, args, kwargs)
    return _known_kinds[key]


def _find_result_kinds(
    operator: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[_Kind]:
    shaped_kwargs = {name: _map_tensors(_shape_only, value) for name, value in kwargs.items()}
    if "device" in kwargs:
        shaped_kwargs["device"] = torch.device("meta")
    shaped = operator(*(_map_tensors(_shape_only, value) for value in args), **shaped_kwargs)
    return [_kind(result) for result in (shaped if isinstance(shaped, tuple) else [shaped])]


def _kind(tensor: torch.Tensor) -> _Kind:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _key(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return _kind(value)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _shape_only(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of the CPU."""
    if tensor.device.type == "cpu":
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    octets = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    host = torch.empty(0, dtype=tensor.dtype)
    return host.set_(octets, tensor.storage_offset(), tensor.shape, tensor.stride())


# --- the stream ---


def _launch(task: Callable[[], object]) -> None:
    number = next(_numbers)
    _waiting[number] = task
    stream = torch.npu.current_stream().npu_stream  # what torch_npu has queued for it comes first
    if _runtime().aclrtLaunchHostFunc(ctypes.c_void_p(stream), _run, ctypes.c_void_p(number)):
        raise RuntimeError("aclrtLaunchHostFunc failed")


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _run(number: int | None) -> None:
    with torch.inference_mode():
        _waiting.pop(number or 0)()


@cache
def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL("libascendcl.so")
