"""Keeping the expert map, the load trace and what experts cost on disk while serving."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import compute_cost
from eplb_platform.records.fault import Fault, RecordError
from eplb_platform.records.load_trace import LoadTraceWriter

logger = logging.getLogger(__name__)


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


class ComputeCostRecorder:
    """Writes what experts cost at each cycle, once something is known; complete and valid at any moment."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def record(self, cost: NDArray[np.float64]) -> None:
        """Replace the file at once; raises RecordError and leaves the old file if it cannot."""
        if np.isfinite(cost).any():
            compute_cost.write(self._path, cost)


class TraceRecorder:
    """Appends to a load trace; the file is complete and valid at any moment."""

    def __init__(
        self, path: Path, num_layers: int, num_logical_experts: int, metadata: Mapping[str, str]
    ) -> None:
        self._path = path
        self._shape = (num_layers, num_logical_experts)
        self._metadata = dict(metadata)
        self._writer: LoadTraceWriter | None = None
        self._is_closed = False

    @property
    def num_steps(self) -> int:
        """Steps appended so far."""
        return 0 if self._writer is None else self._writer.num_steps

    def open(self) -> None:
        """Take the file's place; raises RecordError when it cannot be written."""
        layers, experts = self._shape
        if self._writer is None:
            self._writer = LoadTraceWriter(
                self._path, num_layers=layers, num_logical_experts=experts, metadata=self._metadata
            )
            if self._writer.kept is not None:
                logger.warning(
                    "the recording before this one was killed: its steps are kept in %s", self._writer.kept
                )

    async def add(self, load: NDArray[np.int64], phase: NDArray[np.uint8]) -> None:
        """load: [steps, layers, logical], tokens over all ranks; phase: [steps]. A trace that could not be
        opened is tried again.
        """
        if self._is_closed:
            return
        self.open()
        assert self._writer is not None
        for row, of_row in zip(load, phase.tolist(), strict=True):
            try:
                self._writer.append(row, of_row)
            except ValueError as error:
                raise RecordError(self._path, Fault("", str(error))) from error

    async def publish(self, *, is_last: bool) -> None:
        """Make the trace of all steps so far; unless it is the last time, only once it has doubled."""
        if is_last:
            self.close()
        elif self._writer is not None and not self._is_closed:
            self._writer.checkpoint()

    def close(self) -> None:
        """Make the trace of all steps; what comes later is ignored."""
        self._is_closed = True
        if self._writer is not None:
            self._writer.close()
