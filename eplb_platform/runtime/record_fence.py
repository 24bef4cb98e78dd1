"""A rank that the others took for dead, but that lives, writes over no file of theirs."""

from __future__ import annotations

from eplb_platform.runtime.cycle import RankLink
from eplb_platform.runtime.ports import ControlPlane
from eplb_platform.runtime.resize_meeting import ResizeMeetings

TRIES = 3
FRESH_PART = 0.25


class RecordFence:
    """Asked before a record is written, by any thread with its own client of the store.

    timeout_s: an answer that took a quarter of it is not acted on: this process may have been stopped since.
        What can happen after a fresh one is that this rank writes first, and the living right after it, since
        they record when a resize ends.
    """

    def __init__(self, resizes: ResizeMeetings, link: RankLink, timeout_s: float) -> None:
        self._resizes = resizes
        self._link = link
        self._fresh_s = FRESH_PART * timeout_s

    async def objection(self, plane: ControlPlane) -> str:
        """Why this rank must not write now; empty where it may."""
        clock = self._link.clock
        try:
            for _ in range(TRIES):
                asked = clock.now()
                if await self._resizes.is_left_out(plane):
                    return f"the others went on without rank {self._link.rank}, and record themselves"
                if clock.now() - asked < self._fresh_s:
                    return ""
        except Exception as error:
            return f"rank {self._link.rank} cannot learn whether the others went on without it: {error}"
        return f"rank {self._link.rank}: the store is too slow to say whether the others went on without it"
