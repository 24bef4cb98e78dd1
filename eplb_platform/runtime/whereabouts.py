"""Where a balancer is, for a person and for the watchdog."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from eplb_platform.runtime.cycle import Stage
from eplb_platform.runtime.ports import Clock
from eplb_platform.runtime.watchdog import Progress, Waiting


class Whereabouts:
    """The stage that a rank's cycle is in, for whom it waits there, and the `step` of the forward thread.

    Stage and waiting are set by the thread of the cycle, its begin and the step by the forward thread; any
    may ask.

    on_stage: called with each stage that is entered
    """

    def __init__(self, clock: Clock, on_stage: Callable[[Stage], None] | None = None) -> None:
        self._clock = clock
        self._on_stage = on_stage
        self._stage: Stage | None = None
        self._stage_since = 0.0
        self._waiting: Waiting | None = None
        self._step_started: float | None = None

    @property
    def stage(self) -> Stage | None:
        """That of the running cycle; None between two."""
        return self._stage

    def begin_cycle(self) -> None:
        """A cycle has begun, though its thread may not run yet."""
        self._stage_since = self._clock.now()
        self._stage = Stage.START

    def enter_stage(self, stage: Stage) -> None:
        """The cycle gets on."""
        self._stage_since = self._clock.now()
        self._stage, self._waiting = stage, None
        if self._on_stage is not None:
            self._on_stage(stage)

    def wait_for(self, waiting: Waiting | None) -> None:
        """The cycle has waited long; None: it waits no more."""
        self._waiting = waiting

    def leave_cycle(self) -> None:
        """The cycle has ended."""
        self._stage = self._waiting = None

    def enter_step(self) -> float:
        """The forward thread is in `step` from now on, until `leave_step`; returns the time."""
        self._step_started = self._clock.now()
        return self._step_started

    def leave_step(self) -> None:
        """The forward thread returns to the engine. It is never called for a step that stopped it."""
        self._step_started = None

    def status(self, now: float) -> Mapping[str, object]:
        """As in `Balancer.status`."""
        step_started, waiting = self._step_started, self._waiting
        return {
            "step_running_s": 0.0 if step_started is None else now - step_started,
            "stage_running_s": 0.0 if self._stage is None else max(0.0, now - self._stage_since),
            "waits_at": "" if waiting is None else waiting.place,
            "waits_for": [] if waiting is None else list(waiting.missing),
        }

    def progress(self, cycle: int, *, is_closed: bool) -> Progress | None:
        """What `Balancer.progress` says; cycle: the number of the running one."""
        now, stage, step_started = self._clock.now(), self._stage, self._step_started
        if step_started is not None and stage is None:
            return Progress("the forward thread in step", now - step_started)
        if stage is None or is_closed or (stage is Stage.COMMIT and step_started is None):
            return None
        return Progress(f"cycle {cycle}, stage {stage}", now - self._stage_since, self._waiting)
