"""Where a run ends that goes on until something has happened: at one pass on all ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch.distributed import Store

PATIENCE_S = 150.0


class CommonEnd:
    """How many cycles there are in so many passes is up to the machine, so ranks serve until each has seen
    enough, and all end before the same pass. They must be at most one pass apart, as they are by a model's
    own collectives. After `PATIENCE_S` a run ends as it is, for its test to say what is missing.

    ranks: those that serve; the first of them names the pass
    steps_after: so many passes more
    """

    def __init__(
        self, store: Store, rank: int, ranks: Sequence[int], *, name: str = "", steps_after: int = 0
    ) -> None:
        self._store = store
        self._mine, self._ready = f"ready{name}/{rank}", [f"ready{name}/{other}" for other in ranks]
        self._end = f"end{name}"
        self._is_first = rank == ranks[0]
        self._steps_after = steps_after
        self._is_ready = False
        self._deadline = time.monotonic() + PATIENCE_S

    def has_come(self, step: int, is_enough: bool) -> bool:
        """Whether to end before this pass. is_enough: this rank has seen what it waits for."""
        if is_enough and not self._is_ready:
            self._is_ready = True
            self._store.set(self._mine, "")
        if self._is_first and (self._store.check(self._ready) or time.monotonic() > self._deadline):
            # The others may be a pass ahead: two from now is ahead of all.
            self._store.compare_set(self._end, "", str(step + 2 + self._steps_after))
        return self._store.check([self._end]) and step >= int(self._store.get(self._end))
