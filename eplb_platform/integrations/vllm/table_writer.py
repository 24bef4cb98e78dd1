"""Rows of tables on a device, written in place between two passes without holding up the thread."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from eplb_platform.backend import Backend, StreamOperations

_log = logging.getLogger(__name__)

_ROOMS = 2
"""A commit follows when the device has passed the swap of the one before, and with it the tables of all
commits before that: so what one commit wrote may still be on its way when the next one writes."""


@dataclass(eq=False)
class _Room:
    memory: torch.Tensor
    used: int = 0
    copied: object | None = None
    """After the last copy out of it."""

    def has_left(self, streams: StreamOperations) -> bool:
        """Whether all that was put here is on the device."""
        if self.copied is not None and streams.passed(self.copied):
            self.used, self.copied = 0, None
        return self.used == 0


class TableWriter:
    """Forward thread, on the forward stream; never waits for the device.

    Pinned memory for all rows of the model serves twice, and again once its copies are done. A device that is
    further behind, which no order of commits leads to, is given more of it.

    dtype: of all the tables
    entries: of all rows of all tables together
    """

    def __init__(self, backend: Backend, dtype: torch.dtype, entries: int) -> None:
        self._backend = backend
        self._dtype = dtype
        self._entries = entries
        self._rooms = [self._new_room(entries) for _ in range(_ROOMS)]

    def write(self, table: torch.Tensor, layers: list[int], rows: NDArray[np.int32]) -> None:
        """Overwrite `table[layers]` with `rows`, of one shape; in place, as captured graphs read there.

        Raises RuntimeError, with nothing enqueued, while a graph is captured.
        """
        streams = self._backend.streams
        streams.check_not_capturing()
        room = self._room_for(rows.size)
        place = room.memory[room.used : room.used + rows.size].view(rows.shape)
        place.numpy()[...] = rows
        room.used += rows.size
        for layer, row in zip(layers, place, strict=True):
            streams.copy(table[layer], row)
        room.copied = streams.record()

    def _room_for(self, entries: int) -> _Room:
        """The room in use is the first, so that what is written together lies together."""
        streams = self._backend.streams
        for room in self._rooms:
            if (room.has_left(streams) or room is self._rooms[0]) and self._fits(room, entries):
                break
        else:
            _log.warning("the device is behind by %d writes of all routing tables", len(self._rooms))
            room = self._new_room(max(entries, self._entries))
            self._rooms.append(room)
        self._rooms.remove(room)
        self._rooms.insert(0, room)
        return room

    def _fits(self, room: _Room, entries: int) -> bool:
        return room.used + entries <= len(room.memory)

    def _new_room(self, entries: int) -> _Room:
        return _Room(self._backend.allocate_on_host((entries,), self._dtype))
