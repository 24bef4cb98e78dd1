"""The balancer's ports in simulated time.

All ranks take the same steps and make the same moves, so one balancer stands for every one of them: it agrees
with itself, after as long as all ranks would take, and its group fetches for as long as the busiest link
would. Nothing in here looks at a clock of this machine.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Chunk
from eplb_platform.offline.step_time import StepTime
from eplb_platform.runtime.planning import AlgorithmPlanner, PlannerTimeout
from eplb_platform.runtime.ports import Background, Clock, ControlPlane, ExpertLoad, Group

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Pause:
    """What a coroutine waits for: a time, or earlier a condition."""

    until_s: float
    condition: Callable[[], bool] | None


@types.coroutine
def _suspend(pause: _Pause) -> Generator[_Pause, None, None]:
    yield pause


class SimulatedClock(Clock):
    """The time, which a `Timeline` sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        await _suspend(_Pause(self.seconds + seconds, None))

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        if not condition():
            limit = math.inf if timeout_s is None else self.seconds + timeout_s
            await _suspend(_Pause(limit, condition))
        return condition()


class Timeline(Background):
    """One rank's forward thread and the job beside it, in one order of events."""

    def __init__(self, clock: SimulatedClock) -> None:
        self._clock = clock
        self._job: Coroutine[None, None, None] | None = None
        self._pause = _Pause(0.0, None)
        self._is_closed = False

    # --- the driver's side ---

    def pass_time(self, seconds: float) -> None:
        """The forward thread computes for so long; the job goes on meanwhile."""
        end = self._clock.seconds + seconds
        while self._next_event() <= end:
            self._resume_job()
        self._clock.seconds = end

    def run(self, coroutine: Coroutine[None, None, Result]) -> Result:
        """Run what the forward thread does, which may wait for the job."""
        while True:
            try:
                pause: object = coroutine.send(None)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            if isinstance(pause, _Pause):
                self._wait(pause)

    def end(self) -> None:
        """Leave what is not done undone."""
        if self._job is not None:
            self._job.close()
            self._job = None

    def _wait(self, pause: _Pause) -> None:
        while not (pause.condition is not None and pause.condition()):
            if self._next_event() > pause.until_s or self._next_event() == math.inf:
                if pause.until_s == math.inf:
                    raise RuntimeError("the simulated forward thread waits for what nothing will bring about")
                self._clock.seconds = pause.until_s
                return
            self._resume_job()

    def _next_event(self) -> float:
        """When the job goes on; infinity for never."""
        if self._job is None:
            return math.inf
        if self._pause.condition is not None and self._pause.condition():
            return self._clock.seconds
        return self._pause.until_s

    def _resume_job(self) -> None:
        if self._job is None:
            return
        self._clock.seconds = max(self._clock.seconds, self._next_event())
        try:
            pause: object = self._job.send(None)
        except StopIteration:
            self._job = None
            return
        if isinstance(pause, _Pause):
            self._pause = pause

    # --- the balancer's side ---

    @property
    def is_busy(self) -> bool:
        return self._job is not None

    def start(self, job: Coroutine[None, None, None]) -> None:
        if self._is_closed or self._job is not None:
            raise RuntimeError(f"the timeline is {'closed' if self._is_closed else 'busy'}")
        self._job, self._pause = job, _Pause(self._clock.seconds, None)

    async def wait_idle(self, timeout_s: float) -> bool:
        return await self._clock.until(lambda: self._job is None, timeout_s)

    async def close(self, timeout_s: float) -> bool:
        self._is_closed = True
        return await self.wait_idle(timeout_s)


class SingleVoice(ControlPlane):
    """The store of all ranks, of which one speaks for all: whatever it offers is agreed, `delay_s` later."""

    def __init__(self, clock: SimulatedClock, delay_s: float) -> None:
        self._clock = clock
        self._delay_s = delay_s
        self._values: dict[str, str] = {}

    async def settle(self, key: str, value: str) -> str:
        return self._values.setdefault(key, value)

    async def read(self, key: str) -> str | None:
        return self._values.get(key)

    async def read_all(self, keys: Sequence[str]) -> list[str]:
        return [self._values[key] for key in keys]

    async def count(self, key: str) -> int:
        await self._clock.sleep(self._delay_s)
        self._values[key] = str(int(self._values.get(key, 0)) + 1)
        return int(self._values[key])

    async def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._values.pop(key, None)


class SimulatedGroup(Group):
    """All ranks' group. Their load is already summed, and what they fetch takes the links' time."""

    def __init__(self, clock: SimulatedClock, step_time: StepTime) -> None:
        self._clock = clock
        self._step_time = step_time
        self.is_fetching = False
        self.experts_sent = 0
        """Experts that went from one rank to another."""

    async def rebuild(self, epoch: int, ranks: Sequence[int]) -> None:
        return None

    async def sum(self, load: NDArray[np.int64]) -> NDArray[np.int64]:
        return load

    async def broadcast(self, values: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        return values

    async def fetch(self, chunk: Chunk) -> None:
        self.is_fetching = True
        await self._clock.sleep(self._step_time.fetch(chunk))
        self.is_fetching = False
        self.experts_sent += int(chunk.sends_by_rank().sum())

    def abort(self) -> None:
        self.is_fetching = False


@dataclass(frozen=True)
class SimulatedStaging:
    """Room for `slots` experts on each rank, `nbytes` in all."""

    slots: int
    nbytes: int


class SimulatedMigrator:
    """The weights, of which only the time of the swaps is left; a `Migrator` to the balancer."""

    bytes_received = 0

    def __init__(self, clock: SimulatedClock, step_time: StepTime, staging: SimulatedStaging) -> None:
        self._clock = clock
        self._step_time = step_time
        self.staging = staging
        self.swap_s = 0.0
        self.longest_swap_s = 0.0

    def swap(self, chunk: Chunk) -> None:
        """The forward thread copies: it is as much later."""
        seconds = self._step_time.swap(chunk)
        self._clock.seconds += seconds
        self.swap_s += seconds
        self.longest_swap_s = max(self.longest_swap_s, seconds)

    def follow(self, expert_weights: object) -> None:
        return None

    def note_weights(self) -> None:
        return None


class SimulatedPlanner:
    """The real planner, whose answer comes after `planning_s` of simulated time."""

    def __init__(
        self,
        planner: AlgorithmPlanner,
        clock: SimulatedClock,
        stopwatch: Callable[[], float],
        planning_s: float,
    ) -> None:
        self._planner = planner
        self._clock = clock
        self._stopwatch = stopwatch
        self._planning_s = planning_s
        self.seconds: list[float] = []
        """What each plan took on this machine."""

    async def plan(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        if self._planning_s > self._planner.timeout_s:
            await self._clock.sleep(self._planner.timeout_s)
            raise PlannerTimeout(f"no plan within {self._planner.timeout_s:g} s")
        started = self._stopwatch()
        planned = self._planner.choose(load, current)
        self.seconds.append(self._stopwatch() - started)
        await self._clock.sleep(self._planning_s)
        return planned
