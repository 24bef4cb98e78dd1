"""A rank's heat windows, shared by its two threads."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import HeatWindows, Phase


class LockedHeat:
    """The rank's heat windows, shared by the forward thread that records and the background thread that
    reads.
    """

    def __init__(self, windows: HeatWindows) -> None:
        self._windows = windows
        self._lock = threading.Lock()

    def record(
        self, load: NDArray[np.int64] | None, expert_map: ExpertMap, phase: Phase, is_dummy: bool
    ) -> None:
        with self._lock:
            self._windows.record(load, expert_map, phase=phase, is_dummy=is_dummy)

    def passes(self) -> int:
        """Passes recorded since the start."""
        with self._lock:
            return self._windows.steps_recorded

    def skip_to(self, passes: int) -> None:
        with self._lock:
            self._windows.skip_to(passes)

    def completed_windows(self) -> int:
        with self._lock:
            return self._windows.completed_windows

    def windows_until(self, end: int) -> NDArray[np.int64]:
        with self._lock:
            return self._windows.windows_until(end)
