"""Expert load collection: counts per physical expert and step -> windows of load per logical expert."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

MIN_SKEW_STEPS = 256
"""How many steps a rank may be ahead of another and still have the windows that the other speaks of."""


class Phase(IntEnum):
    """What a forward pass computed; the numbers are those of load traces."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2


class LoadCollection(StrEnum):
    """Which passes count. A mixed pass counts in each: its tokens cannot be told apart."""

    ALL = "all"
    PREFILL = "prefill"
    DECODE = "decode"

    def counts(self, phase: Phase) -> bool:
        return self is LoadCollection.ALL or phase is Phase.MIXED or self.value == phase.name.lower()


class HeatWindows:
    """The expert load of one rank's last steps, in consecutive windows of equally many steps.

    Windows are numbered by the calls of `record` alone, dummy and uncounted passes included. So window i
    means the same passes on every rank that calls it once per pass, whatever each rank did in them, and the
    ranks may add their windows elementwise. What a map change costs is small: only changed layers are folded.
    Memory is bounded and allocated at once. Not safe for threads: the caller locks.

    num_layers, num_logical_experts: of the model
    steps: how many steps back the windows reach, at least 1
    num_windows: into how many they are cut, at least 1; fewer where `steps` is not a multiple
    collection: the phases that count
    """

    def __init__(
        self,
        num_layers: int,
        num_logical_experts: int,
        steps: int,
        num_windows: int = 16,
        collection: LoadCollection = LoadCollection.ALL,
    ) -> None:
        for name, value in (("steps", steps), ("num_windows", num_windows)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.collection = LoadCollection(collection)
        self.steps_per_window = -(-steps // num_windows)
        self.max_windows = steps // self.steps_per_window
        # One more is being filled.
        kept = self.max_windows + -(-MIN_SKEW_STEPS // self.steps_per_window) + 1
        self._windows = np.zeros((kept, num_layers, num_logical_experts), dtype=np.int64)
        self._steps = 0
        self._map: ExpertMap | None = None
        self._physical = np.zeros((num_layers, 0), dtype=np.int64)

    @property
    def steps_recorded(self) -> int:
        """Calls of `record` since the start or `clear`."""
        return self._steps

    @property
    def completed_windows(self) -> int:
        """Windows completed since the start or `clear`, those no longer kept included."""
        return self._steps // self.steps_per_window

    def record(
        self,
        physical_load: NDArray[np.integer] | None,
        expert_map: ExpertMap,
        *,
        phase: Phase = Phase.MIXED,
        is_dummy: bool = False,
    ) -> None:
        """One forward pass has ended.

        physical_load: [layers, physical] tokens that this rank routed to each slot by `expert_map`, or None;
            only read. Counts in slots of inactive ranks are ignored.
        is_dummy: a pass without requests, whose tokens mean nothing; it is counted as a step only.

        Raises ValueError for an array of another shape or type, and a map of another model.
        """
        if physical_load is not None and not is_dummy and self.collection.counts(phase):
            self._add(physical_load, expert_map)
        self._end_pass()

    def _end_pass(self) -> None:
        completes = (self._steps + 1) % self.steps_per_window == 0
        if completes:
            self._fold_layers(np.arange(len(self._physical)))
        self._steps += 1
        if completes:
            self._filling[...] = 0  # until now the oldest window that was kept

    def fold(self, expert_map: ExpertMap) -> None:
        """Turn the counts gathered so far into logical ones, before `expert_map` gives way to another.

        Not needed for right counts (`record` does it when it meets another map), only to choose the moment.
        Raises ValueError when the counts were recorded under another map.
        """
        if self._map is None:
            return
        if self._map != expert_map:
            raise ValueError(f"counts were recorded under {self._map!r}, not under {expert_map!r}")
        self._fold_layers(np.arange(len(self._physical)))

    def windows(self) -> NDArray[np.int64]:
        """The completed windows of the last steps, [windows, layers, logical], oldest first; a copy."""
        return self.windows_until(self.completed_windows)

    def windows_until(self, end: int) -> NDArray[np.int64]:
        """The windows before number `end`, at most `max_windows`: [windows, layers, logical], oldest first.

        The shape depends on `end` alone, so that ranks that agree on it can add theirs. Windows that this
        rank no longer keeps, having completed many since, are zero. Raises ValueError for an `end` beyond
        `completed_windows`.
        """
        if not 0 <= end <= self.completed_windows:
            raise ValueError(f"window {end} was asked for, {self.completed_windows} are completed")
        kept = len(self._windows)
        first = max(0, end - self.max_windows)
        oldest_kept = self.completed_windows - kept + 1
        load = np.zeros((end - first, *self._windows.shape[1:]), dtype=np.int64)
        for number in range(max(first, oldest_kept), end):
            load[number - first] = self._windows[number % kept]
        return load

    def skip_to(self, steps: int) -> None:
        """Count on to `steps_recorded` = `steps`, as if the passes meanwhile had had no load."""
        if steps - self._steps >= len(self._windows) * self.steps_per_window:
            self._windows[...] = 0
            self._physical[...] = 0
            self._steps = steps
        while self._steps < steps:
            self._end_pass()

    def clear(self) -> None:
        """Forget all load and count windows from 0 again; every rank must, at the same step."""
        self._steps = 0
        self._physical[...] = 0
        self._filling[...] = 0

    @property
    def _filling(self) -> NDArray[np.int64]:
        """The window being filled, [layers, logical]."""
        window: NDArray[np.int64] = self._windows[self.completed_windows % len(self._windows)]
        return window

    def _add(self, physical_load: NDArray[np.integer], expert_map: ExpertMap) -> None:
        if expert_map is not self._map:
            self._follow(expert_map)
        if physical_load.shape != self._physical.shape or not np.can_cast(physical_load.dtype, np.int64):
            raise ValueError(
                f"physical_load is {physical_load.dtype} {list(physical_load.shape)}, "
                f"expected integers {list(self._physical.shape)} [layers, physical]"
            )
        self._physical += physical_load

    def _follow(self, expert_map: ExpertMap) -> None:
        """Count by `expert_map` from now on."""
        model = self._windows.shape[1:]
        if (expert_map.num_layers, expert_map.num_logical_experts) != model:
            raise ValueError(f"load is of {model[0]} layers of {model[1]} experts, not of {expert_map!r}")
        old, new = self._map, expert_map.physical_to_logical
        if old is None or old.physical_to_logical.shape != new.shape:
            self._fold_layers(np.arange(len(self._physical)))
            self._physical = np.zeros(new.shape, dtype=np.int64)
        else:
            self._fold_layers(np.flatnonzero((old.physical_to_logical != new).any(axis=1)))
        self._map = expert_map

    def _fold_layers(self, layers: NDArray[np.intp]) -> None:
        """Move the physical counts of `layers` into the window being filled."""
        if self._map is None or layers.size == 0:
            return
        from eplb_platform.heat_kernels import fold_load  # late: many processes need only the names here

        fold_load(self._physical, self._map.physical_to_logical, layers, self._filling)
        self._physical[layers] = 0


@cache
def warm_up() -> None:
    """Compile what windows and step loads need, so that no forward pass waits for it."""
    from eplb_platform.heat_kernels import fold_load

    layers, load = np.zeros(1, dtype=np.int64), np.zeros((1, 1), dtype=np.int64)
    experts = ExpertMap.initial(1, 1, Topology(1)).physical_to_logical
    for counts in (np.zeros((1, 1), dtype=np.int32), np.zeros((1, 1), dtype=np.int64)):
        fold_load(counts, experts, layers, load)
