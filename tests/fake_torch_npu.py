"""What torch_npu says and does about NZ tensors, on a CPU: real blocks, real padding, and the same traps.

Written from the behaviour of torch_npu 2.13.0. It cannot show what a device does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

ND, NZ = 2, 29
_BLOCK = 16


class NpuTensor(torch.Tensor):
    """Its storage is in NZ blocks: its own strides lead to the wrong elements, as on the device."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.empty_like and args[0].untyped_storage().data_ptr() in _Formats.of:
                return _Formats.current().empty_like(args[0])
            if function is torch.Tensor.copy_:
                return _copy(args[0], args[1])
            result = function(*args, **kwargs)
            return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result


class _Formats:
    """Which storages are in NZ; replaced for every test."""

    of: ClassVar[dict[int, torch.Tensor]] = {}
    """By address: the stored blocks [..., columns / 16, rows / 16, 16, 16]."""
    _current: ClassVar[FakeTorchNpu]

    @classmethod
    def current(cls) -> FakeTorchNpu:
        return cls._current


class FakeTorchNpu(ModuleType):
    def __init__(self) -> None:
        super().__init__("torch_npu")
        self.allow_internal_format = True
        _Formats.of = {}
        _Formats._current = self

    def get_npu_format(self, tensor: torch.Tensor) -> int:
        return NZ if _blocks(tensor) is not None else ND

    def get_storage_size(self, tensor: torch.Tensor) -> int:
        blocks = _blocks(tensor)
        return (
            tensor.untyped_storage().nbytes() // tensor.element_size() if blocks is None else blocks.numel()
        )

    def npu_format_cast(self, tensor: torch.Tensor, acl_format: int) -> torch.Tensor:
        blocks = _blocks(tensor)
        if acl_format == ND:
            return tensor if blocks is None else _plain(blocks, tensor.shape)
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
        if blocks is not None or is_view or not self.allow_internal_format:
            return tensor
        nz = self._empty(tensor.shape, tensor.dtype)
        _blocks(nz).copy_(_blocked(tensor))  # type: ignore[union-attr]
        return nz

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.allow_internal_format:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        return self._empty(tensor.shape, tensor.dtype)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.zeros(_padded(shape), dtype=dtype)
        _Formats.of[memory.untyped_storage().data_ptr()] = memory
        nz = torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 0, tuple(shape))  # type: ignore[call-overload]
        return nz.as_subclass(NpuTensor)  # type: ignore[no-any-return]


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorchNpu]:
    fake = FakeTorchNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    yield fake


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """What the device would compute with."""
    blocks = _blocks(tensor)
    return tensor if blocks is None else _plain(blocks, tensor.shape)


def _copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    of_target, of_source = _blocks(target), _blocks(source)
    if of_target is None:
        return target.as_subclass(torch.Tensor).copy_(values_of(source))
    if of_source is None or of_source.shape != of_target.shape:
        of_target.fill_(-1)  # torch_npu converts the target, not the source
        return target
    of_target.copy_(of_source)
    return target


def _blocks(tensor: torch.Tensor) -> torch.Tensor | None:
    return _Formats.of.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None


def _padded(shape: Sequence[int]) -> tuple[int, ...]:
    *stacked, rows, columns = shape
    return (*stacked, -(-columns // _BLOCK), -(-rows // _BLOCK), _BLOCK, _BLOCK)


def _blocked(tensor: torch.Tensor) -> torch.Tensor:
    *stacked, column_blocks, row_blocks, _, _ = _padded(tensor.shape)
    room = torch.zeros((*stacked, row_blocks * _BLOCK, column_blocks * _BLOCK), dtype=tensor.dtype)
    room[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return room.view(*stacked, row_blocks, _BLOCK, column_blocks, _BLOCK).movedim(-2, -4)


def _plain(blocks: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    *stacked, column_blocks, row_blocks, _, _ = blocks.shape
    joined = blocks.movedim(-4, -2).reshape(*stacked, row_blocks * _BLOCK, column_blocks * _BLOCK)
    return joined[..., : shape[-2], : shape[-1]].clone()
