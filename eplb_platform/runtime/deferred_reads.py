"""Reading what the device counts without waiting for it: values come some passes later, with their tags."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from eplb_platform.backend import Backend

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class _Read(Generic[Tag]):
    place: torch.Tensor
    mark: object
    tag: Tag


class DeferredReader(Generic[Tag]):
    """Takes tensors of one shape from the device to the host, in order. Forward thread, between passes.

    What a value is to be understood by (the map in force in that pass, say) travels as its tag: when the
    value is there, it may have changed.

    depth: values that may be on their way at a time
    """

    def __init__(self, backend: Backend, shape: Sequence[int], dtype: torch.dtype, *, depth: int = 8) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._streams = backend.streams
        self._free = [backend.allocate_on_host(shape, dtype) for _ in range(depth)]
        self._reads: deque[_Read[Tag]] = deque()

    def put(self, tensor: torch.Tensor, tag: Tag) -> bool:
        """Enqueue a read of `tensor` as the current stream leaves it by now; it may change right afterwards.

        False, and nothing is read, while as many values as fit are on their way: the device is far behind.
        Raises RuntimeError, with nothing enqueued, while a graph is captured.
        """
        self._streams.check_not_capturing()
        if not self._free:
            return False
        place = self._free.pop()
        self._streams.copy(place, tensor)
        self._reads.append(_Read(place, self._streams.record(), tag))
        return True

    def ready(self) -> list[tuple[Tag, NDArray[np.generic]]]:
        """The values that have arrived since the last call, oldest first. Never blocks."""
        arrived: list[tuple[Tag, NDArray[np.generic]]] = []
        while self._reads and self._streams.passed(self._reads[0].mark):
            read = self._reads.popleft()
            arrived.append((read.tag, read.place.numpy().copy()))
            self._free.append(read.place)
        return arrived
