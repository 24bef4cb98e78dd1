"""Rows of tables on a device, written in place between two passes without holding up the thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from eplb_platform.backend import Backend

ROOM_ENTRIES = 1 << 20
"""Of the host memory that rows pass through: a layer's table of 256 experts takes 16,384."""

_POLL_S = 0.0001


class TableWriter:
    """Forward thread, on the forward stream. `dtype`: of all the tables.

    The same pinned memory serves every write. One that does not fit behind what is still being copied waits
    for that: with a commit every few passes it never does.
    """

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self._streams = backend.streams
        self._room = backend.allocate_on_host((ROOM_ENTRIES,), dtype)
        self._used = 0
        self._copied: object | None = None

    def write(self, table: torch.Tensor, layers: list[int], rows: NDArray[np.int32]) -> None:
        """Overwrite `table[layers]` with `rows`, of one shape; in place, as captured graphs read there."""
        for layer, row in zip(layers, rows, strict=True):
            place = self._place(row.size).view(row.shape)
            place.copy_(torch.from_numpy(np.ascontiguousarray(row)))
            self._streams.copy(table[layer], place)
            self._copied = self._streams.record()

    def _place(self, entries: int) -> torch.Tensor:
        if entries > ROOM_ENTRIES:
            raise ValueError(f"a table row of {entries} entries does not fit in {ROOM_ENTRIES}")
        if self._copied is not None and self._streams.passed(self._copied):
            self._used = 0
        if self._used + entries > ROOM_ENTRIES:
            while self._copied is not None and not self._streams.passed(self._copied):
                time.sleep(_POLL_S)
            self._used = 0
        start, self._used = self._used, self._used + entries
        return self._room[start : self._used]
