"""The tokens that vLLM's routers counted on the device, brought to the host without waiting for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.runtime.deferred_reads import DeferredReader

if TYPE_CHECKING:
    import torch

    from eplb_platform.backend import Backend


@dataclass(frozen=True)
class Circumstances:
    """What a pass's counts are to be understood by."""

    expert_map: ExpertMap
    phase: Phase
    is_dummy: bool


@dataclass(frozen=True)
class PassLoad:
    """Tokens of one pass to each physical expert, [layers, physical], or of several in like circumstances."""

    load: NDArray[np.int64]
    circumstances: Circumstances


class LoadCounts:
    """Reads and clears the counter of each pass; on a host at once, on a device some passes later."""

    def __init__(self, counter: torch.Tensor, backend: Backend) -> None:
        """counter: [layers, physical], which the routers add to in place."""
        self._counter = counter
        self._reader: DeferredReader[Circumstances] = DeferredReader(backend, counter.shape, counter.dtype)
        self._arrived: deque[PassLoad] = deque()
        self._unread: Circumstances | None = None

    def end_of_pass(self, circumstances: Circumstances) -> PassLoad | None:
        """Start to read what the pass counted, and return what has arrived: the oldest that is there.

        Where the device is too far behind to take another read, passes are counted together, as long as they
        are in like circumstances; a dummy's tokens are never counted.
        """
        is_mixed = self._unread not in (None, circumstances)
        if is_mixed or circumstances.is_dummy or self._reader.put(self._counter, circumstances):
            self.forget()
        else:
            self._unread = circumstances
        for tag, values in self._reader.ready():
            self._arrived.append(PassLoad(values.astype(np.int64), tag))
        if not self._arrived:
            return None
        oldest = self._arrived.popleft()
        while self._arrived and self._arrived[0].circumstances == oldest.circumstances:
            oldest = PassLoad(oldest.load + self._arrived.popleft().load, oldest.circumstances)
        return oldest

    def forget(self) -> None:
        """Drop what was counted since the last pass."""
        self._counter.zero_()
        self._unread = None
