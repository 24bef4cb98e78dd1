"""Keeping the expert map on disk while serving."""

from __future__ import annotations

from pathlib import Path

from eplb_platform.expert_map import ExpertMap


class MapRecorder:
    """Writes the expert map at each cycle's end; the file is complete and valid at any moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has_written = False

    async def record(self, expert_map: ExpertMap, *, keep_earlier: bool) -> None:
        """Replace the file at once by one with `expert_map`; raises RecordError and leaves the old file if it
        cannot.

        keep_earlier: leave a map that this run has already written, since `expert_map` comes from no load.
        """
        if not (keep_earlier and self._has_written):
            expert_map.save(self._path)
            self._has_written = True
