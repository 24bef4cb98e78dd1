"""Progress while the demo runs, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from eplb_platform.balance import balancedness
from eplb_platform.demo.messages import Progress as RankProgress


class Display:
    """One line for each phase: how far it is, how balanced the latest forward passes were, what has moved."""

    def __init__(self, console: Console, num_ranks: int) -> None:
        self._console = console
        self._num_ranks = num_ranks
        self._steps: dict[str, int] = {}
        self._tasks: dict[str, TaskID] = {}
        self._loads: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
        self._bars = Progress(
            TextColumn("{task.description:10}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self._tasks[phase] = self._bars.add_task(phase, total=steps, state="starting the ranks")
        if not self._console.is_terminal:
            self._console.print(f"phase {phase} ...")

    def update(self, phase: str, rank: int, progress: RankProgress) -> None:
        """Take a rank's report; the line changes once all ranks have reported the same forward passes."""
        reports = self._loads.setdefault((phase, progress.step), [])
        reports.append(progress.load)
        if len(reports) < self._num_ranks:
            return
        latest = float(balancedness(np.sum(reports, axis=0)).mean())
        del self._loads[phase, progress.step]
        state = f"balancedness {latest:.2f}"
        if progress.cycles:
            state += f", {progress.cycles} cycles, {progress.moved_experts} moved"
        self._bars.update(self._tasks[phase], completed=progress.step, state=state)

    def end(self, phase: str) -> None:
        self._bars.update(self._tasks[phase], completed=self._steps[phase])
