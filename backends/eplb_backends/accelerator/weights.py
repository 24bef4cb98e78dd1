"""An expert's weights on a device: their bytes, their staging, their swap into place, their checksum."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_backends.accelerator.streams import wait_on_host
from eplb_backends.cpu.weights import checksum_of
from eplb_platform.backend import GroupError, StreamOperations


class DenseLayout:
    """The bytes of tensors that lie in memory as torch describes them.

    A device with formats of its own (NZ) overrides this: a view of such a tensor is not its memory.
    """

    def as_enqueued(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What the device's collective library takes for the tensor's memory, of one size on both ends; None
        where the tensor does not lie together.
        """
        tensor = tensor.detach()
        return _octets(tensor) if tensor.is_contiguous() else None

    def to_send(self, streams: StreamOperations, tensor: torch.Tensor) -> torch.Tensor:
        """uint8 [bytes] on the device, to be read on the current stream: the tensor's bytes in order."""
        tensor = tensor.detach()
        if not tensor.is_contiguous():
            scattered, tensor = tensor, torch.empty_like(tensor, memory_format=torch.contiguous_format)
            streams.copy(tensor, scattered)
        return _octets(tensor)

    def to_fill(self, tensor: torch.Tensor) -> torch.Tensor:
        """uint8 [bytes] on the device, to be written on the current stream."""
        tensor = tensor.detach()
        if not tensor.is_contiguous():
            tensor = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return _octets(tensor)

    def fill(self, streams: StreamOperations, tensor: torch.Tensor, octets: torch.Tensor) -> None:
        """`octets`, which `to_fill` gave, are written: bring them into the tensor, on the current stream."""
        if not tensor.is_contiguous():
            streams.copy(tensor.detach(), octets.view(tensor.dtype).view(tensor.shape))


def allocate_staging(parameter: Sequence[torch.Tensor] | torch.Tensor, slots: int) -> Sequence[torch.Tensor]:
    """As `Backend.allocate_staging`. Raises `ValueError` when the experts differ in shape or type."""
    kinds = {(tuple(expert.shape), expert.dtype) for expert in parameter}
    if len(kinds) != 1:
        raise ValueError(
            f"a parameter's experts must have one shape and type, found {sorted(map(str, kinds))}"
        )
    if slots < 0:
        raise ValueError(f"cannot stage {slots} experts")
    return [torch.empty_like(parameter[0], requires_grad=False) for _ in range(slots)]


def swap_in(
    streams: StreamOperations,
    parameter: Sequence[torch.Tensor] | torch.Tensor,
    slots: Sequence[int],
    staging: Sequence[torch.Tensor],
    rows: Sequence[int],
) -> None:
    """As `Backend.swap_in`: one copy for each slot, on the current stream."""
    if len(slots) != len(rows):
        raise ValueError(f"{len(slots)} slots {list(slots)} cannot take {len(rows)} rows {list(rows)}")
    with torch.no_grad():
        for slot, row in zip(slots, rows, strict=True):
            streams.copy(parameter[slot], staging[row])


def checksum(
    streams: StreamOperations,
    layout: DenseLayout,
    tensors: Sequence[torch.Tensor],
    room: torch.Tensor,
    timeout_s: float,
) -> int:
    """As `Backend.checksum`, and the same number as the CPU backend's. Not for the forward thread.

    room: uint8 [bytes], pinned, through which the tensors pass.
    Raises `GroupError` when the device has not copied a piece within `timeout_s` seconds.
    """
    return checksum_of(_on_host(streams, layout, tensors, room, timeout_s))


def _on_host(
    streams: StreamOperations,
    layout: DenseLayout,
    tensors: Sequence[torch.Tensor],
    room: torch.Tensor,
    timeout_s: float,
) -> Iterator[NDArray[np.uint8]]:
    """The bytes in pieces, each valid until the next one is asked for."""
    for tensor in tensors:
        octets = layout.to_send(streams, tensor)
        for piece in octets.split(room.numel()):
            landed = room[: piece.numel()]
            streams.copy(landed, piece)
            if not wait_on_host(streams, streams.record(), time.monotonic() + timeout_s):
                raise GroupError(f"the device has not copied {piece.numel()} bytes within {timeout_s:g} s")
            yield landed.numpy()


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
