"""An expert's weights in host memory: staged, swapped into place, summed up."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray


class StagingRows(Sequence[torch.Tensor]):
    """The rows of one contiguous buffer [slots, ...], so that neighbouring rows can be copied as one."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self._rows = list(buffer.unbind(0)) if buffer.shape[0] else []

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[torch.Tensor]: ...

    def __getitem__(self, row: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        return self._rows[row]


def allocate_staging(parameter: Sequence[torch.Tensor] | torch.Tensor, slots: int) -> StagingRows:
    """As `Backend.allocate_staging`. Raises `ValueError` when the experts differ in shape or type."""
    kinds = {(tuple(expert.shape), expert.dtype) for expert in parameter}
    if len(kinds) != 1:
        raise ValueError(
            f"a parameter's experts must have one shape and type, found {sorted(map(str, kinds))}"
        )
    if slots < 0:
        raise ValueError(f"cannot stage {slots} experts")
    [(shape, dtype)] = kinds
    buffer = torch.empty((slots, *shape), dtype=dtype, device=parameter[0].device)
    return StagingRows(buffer.zero_())  # written once, so that the memory is there before it is needed


def swap_in(
    parameter: Sequence[torch.Tensor] | torch.Tensor,
    slots: Sequence[int],
    staging: Sequence[torch.Tensor],
    rows: Sequence[int],
) -> None:
    """As `Backend.swap_in`: one copy if slots and rows are neighbours in one tensor, else one for each."""
    if len(slots) != len(rows):
        raise ValueError(f"{len(slots)} slots {list(slots)} cannot take {len(rows)} rows {list(rows)}")
    with torch.no_grad():
        if (
            isinstance(parameter, torch.Tensor)
            and isinstance(staging, StagingRows)
            and _are_neighbours(rows)
            and _are_neighbours(slots)
        ):
            parameter[slots[0] : slots[-1] + 1].copy_(staging.buffer[rows[0] : rows[-1] + 1])
            return
        for slot, row in zip(slots, rows, strict=True):
            parameter[slot].copy_(staging[row])


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """As `Backend.checksum`."""
    return checksum_of(
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors
    )


def checksum_of(pieces: Iterable[NDArray[np.uint8]]) -> int:
    """CRC-32 and Adler-32 of all bytes, which run at 2 GB/s and without the interpreter lock.

    Each piece is read before the next one is asked for.
    """
    crc, adler = 0, 1
    for octets in pieces:
        crc, adler = zlib.crc32(octets.data, crc), zlib.adler32(octets.data, adler)
    return crc << 31 | adler >> 1


def _are_neighbours(indices: Sequence[int]) -> bool:
    return len(indices) > 0 and list(indices) == list(range(indices[0], indices[0] + len(indices)))
