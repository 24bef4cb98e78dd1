"""The expert load of single passes, kept on every rank until the ranks have added it up for the trace."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase

BLOCK_BYTES = 1 << 23
"""Passes that are added up at once take about so much memory."""


@dataclass(frozen=True)
class _Pass:
    load: NDArray[np.int32] | None
    """[layers, physical] as `expert_map` has them; None for no tokens."""
    expert_map: ExpertMap
    phase: Phase | None
    """None for a dummy pass."""


class StepLoads:
    """One rank's passes that are not yet in the trace; safe for one thread that records and one that reads.

    Passes are numbered by the calls of `record`, dummy ones included, so that a number means the same pass on
    every rank.

    steps: the passes to keep, by number; None keeps all
    capacity: most passes kept; beyond it the oldest are lost to the trace
    """

    def __init__(
        self, num_layers: int, num_logical_experts: int, *, steps: range | None, capacity: int
    ) -> None:
        self.shape = (num_layers, num_logical_experts)
        self._lost = 0
        self._steps = steps
        self._capacity = capacity
        self._passes: list[_Pass] = []
        self._recorded = 0
        self._first = 0
        self._lock = threading.Lock()

    def record(
        self,
        physical_load: NDArray[np.integer] | None,
        expert_map: ExpertMap,
        *,
        phase: Phase = Phase.MIXED,
        is_dummy: bool = False,
    ) -> None:
        """A pass has ended. Arguments as of `HeatWindows.record`; raises ValueError for another shape."""
        number, self._recorded = self._recorded, self._recorded + 1
        if self._steps is not None and number not in self._steps:
            return
        if physical_load is not None and physical_load.shape != expert_map.physical_to_logical.shape:
            raise ValueError(
                f"physical_load is {list(physical_load.shape)}, "
                f"expected {list(expert_map.physical_to_logical.shape)} [layers, physical]"
            )
        load = None if physical_load is None or is_dummy else physical_load.astype(np.int32)
        with self._lock:
            if not self._passes:
                self._first = number
            self._passes.append(_Pass(load, expert_map, None if is_dummy else Phase(phase)))
            if len(self._passes) > self._capacity:
                self._forget(1)
                self._lost += 1

    @property
    def recorded(self) -> int:
        """Passes counted so far."""
        return self._recorded

    def skip_to(self, passes: int, expert_map: ExpertMap) -> None:
        """Count on to `passes`: those meanwhile were made by other ranks alone."""
        first_kept = passes - self._capacity
        if self._recorded < first_kept:
            with self._lock:
                self._passes.clear()
            self._recorded = first_kept
        while self._recorded < passes:
            self.record(None, expert_map, is_dummy=True)

    def kept(self) -> tuple[int, int]:
        """Numbers of the first pass that is kept and of the one after the last."""
        with self._lock:
            if self._passes:
                return self._first, self._first + len(self._passes)
        return self._recorded, self._recorded

    def take_lost(self) -> int:
        """Passes that were lost to the trace since the last call."""
        with self._lock:
            lost, self._lost = self._lost, 0
        return lost

    @property
    def is_complete(self) -> bool:
        """Whether the last pass to be kept has been recorded."""
        return self._steps is not None and self._recorded >= self._steps.stop

    @property
    def block_steps(self) -> int:
        """Passes that go into one block."""
        return max(1, BLOCK_BYTES // (8 * self.shape[0] * self.shape[1]))

    def block(self, first: int, end: int) -> NDArray[np.int64]:
        """Passes `first` to `end` - 1, to be added up over ranks: [passes, layers * logical + 3].

        The last columns say in which phase this rank was: 1 for that one, nothing for a dummy pass. A pass
        that this rank has lost meanwhile counts as one.
        """
        from eplb_platform.heat_kernels import fold_load

        with self._lock:
            missing = max(0, self._first - first)
            passes = self._passes[max(0, first - self._first) : max(0, end - self._first)]
        load = np.zeros((end - first, *self.shape), dtype=np.int64)
        layers = np.arange(self.shape[0])
        phase = np.zeros((end - first, len(Phase)), dtype=np.int64)
        for row, one in enumerate(passes, start=missing):
            if one.load is not None:
                fold_load(one.load, one.expert_map.physical_to_logical, layers, load[row])
            if one.phase is not None:
                phase[row, one.phase] = 1
        return np.concatenate([load.reshape(end - first, -1), phase], axis=1)

    def rows(self, total: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """From a block that was added up: (load [steps, layers, logical], phase [steps]).

        A pass that was a dummy on every rank is no step. One in which ranks were in different phases is
        mixed.
        """
        in_phase = total[:, -len(Phase) :]
        ranks = in_phase.sum(axis=1)
        served = ranks > 0
        phase = np.where(in_phase.max(axis=1) == ranks, in_phase.argmax(axis=1), Phase.MIXED)
        load = total[:, : -len(Phase)].reshape(len(total), *self.shape)
        return load[served], phase[served].astype(np.uint8)

    def forget_until(self, end: int) -> None:
        """The trace has the passes before number `end`."""
        with self._lock:
            self._forget(max(0, min(end - self._first, len(self._passes))))

    def _forget(self, count: int) -> None:
        del self._passes[:count]
        self._first += count
