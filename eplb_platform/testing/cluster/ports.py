"""A rank's ports as the simulation has them: its clock, its background task, its planner and its files."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.survival import Survival, check_survival, survives
from eplb_platform.balance import window_balancedness
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records.fault import Fault, RecordError
from eplb_platform.runtime.planning import AlgorithmPlanner, PlannerTimeout
from eplb_platform.runtime.ports import Background, Clock, ExpertLoad
from eplb_platform.testing.cluster.scheduler import Scheduler, Task
from eplb_platform.testing.cluster.store import SimulatedStore

if TYPE_CHECKING:
    from eplb_platform.testing.cluster.engine import Engine

LOOKS_PER_TIMEOUT = 3
"""A task that sleeps between two looks at the store is woken by news, and else so often in a time-out."""


class SimulatedClock(Clock):
    """One rank's clock, with an origin and a speed of its own.

    Polls of the store that would find nothing are left out: `sleep` ends when a key that was looked for is
    written, when the rank is poked, or after a part of the time-out.
    """

    def __init__(self, scheduler: Scheduler, store: SimulatedStore, *, timeout_s: float) -> None:
        self.offset_s = scheduler.random.uniform(0, 1e5)
        self.rate = 1.0
        self._scheduler = scheduler
        self._store = store
        self._look_s = timeout_s / LOOKS_PER_TIMEOUT
        self._waiting: list[Task] = []

    def now(self) -> float:
        return self.offset_s + self.rate * self._scheduler.now

    def jump(self, seconds: float) -> None:
        """The clock goes forward by so much at once."""
        self.offset_s += seconds

    async def sleep(self, seconds: float) -> None:
        task = self._scheduler.current
        assert task is not None
        keys, task.looked_for = task.looked_for, []
        if not keys or any(key in self._store.values for key in keys):
            await self._scheduler.sleep(seconds)
            return
        self._waiting.append(task)
        self._store.wake_when_written(keys, task)
        await self._scheduler.park(self._look_s * (0.7 + 0.3 * self._scheduler.random.random()))
        self._waiting.remove(task)

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        task = self._scheduler.current
        assert task is not None
        self._waiting.append(task)
        started = self.now()
        try:
            while not condition():
                left = (
                    self._look_s if timeout_s is None else min(self._look_s, started + timeout_s - self.now())
                )
                if left <= 0:
                    return False
                await self._scheduler.park(left)
            return True
        finally:
            self._waiting.remove(task)

    def poke(self) -> None:
        """Something on this rank has changed: those who wait look again."""
        for task in self._waiting:
            self._scheduler.wake(task)


class SimulatedBackground(Background):
    """The background thread as a task of the scheduler."""

    def __init__(self, scheduler: Scheduler, rank: int, clock: SimulatedClock) -> None:
        self.task: Task | None = None
        self._job: Coroutine[None, None, None] | None = None
        self._scheduler = scheduler
        self._rank = rank
        self._clock = clock
        self._is_closed = False

    @property
    def is_busy(self) -> bool:
        return self.task is not None and not self.task.is_done

    def start(self, job: Coroutine[None, None, None]) -> None:
        if self.is_busy or self._is_closed:
            job.close()
            raise RuntimeError(
                f"rank {self._rank}: the background is {'closed' if self._is_closed else 'busy'}"
            )
        self._job = job
        self.task = self._scheduler.spawn(self._rank, "background", self._run(job))

    def kill(self) -> None:
        """Nothing goes on here."""
        if self.task is not None and self._job is not None and self.task is not self._scheduler.current:
            self._scheduler.kill(self.task)
            self._job.close()

    async def wait_idle(self, timeout_s: float) -> bool:
        return await self._clock.until(lambda: not self.is_busy, timeout_s)

    async def close(self, timeout_s: float) -> bool:
        self._is_closed = True
        return await self._clock.until(lambda: not self.is_busy, timeout_s)

    async def _run(self, job: Coroutine[None, None, None]) -> None:
        try:
            await job
        finally:
            self._scheduler.call_at(self._scheduler.now, self._clock.poke)


class SimulatedPlanner:
    """Makes a random valid map, quickly, or lets an algorithm plan; or does what a fault says.

    check: called with the load of each plan; answers: maps that are answered first
    violate: called with what is wrong with an algorithm's plan
    """

    def __init__(
        self,
        scheduler: Scheduler,
        draw: random.Random,
        *,
        timeout_s: float,
        check: Callable[[ExpertLoad], None],
        injected: Callable[[str], None],
        algorithm: AlgorithmPlanner | None,
        answers: Sequence[ExpertMap],
        violate: Callable[[str], None],
    ) -> None:
        self.fault = ""
        self.most_layers = 1000
        self._scheduler = scheduler
        self._random = draw
        self._timeout_s = timeout_s
        self._check = check
        self._injected = injected
        self._answers = deque(answers)
        self._choose = self._any_map if algorithm is None else algorithm.choose
        self._judge = _no_judgement if algorithm is None else partial(_judge_plan, violate, algorithm)

    async def plan(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        self._check(load)
        fault, self.fault = self.fault, ""
        if fault:
            self._injected(fault)
        await self._scheduler.sleep(self._timeout_s * 0.1 * self._random.random())
        if fault == "planner exception":
            raise ArithmeticError("the algorithm divides by zero")
        if fault == "planner time-out":
            await self._scheduler.sleep(self._timeout_s)
            raise PlannerTimeout("the algorithm gave no plan in time")
        if fault == "planner late":
            await self._scheduler.sleep(self._timeout_s * self._random.uniform(0.5, 3))
        while fault == "planner never answers":
            await self._scheduler.sleep(1e9)
        if fault == "planner nonsense":
            return _nonsense(current, self._random)
        if self._answers and self._answers[0].topology == current.topology:
            return self._answers.popleft()
        planned = self._choose(load, current)
        self._judge(load, current, planned)
        return planned

    def _any_map(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        table = current.physical_to_logical.copy()
        draw = self._random
        layers = [layer for layer in range(current.num_layers) if draw.random() < 0.8]
        for layer in draw.sample(layers, min(len(layers), self.most_layers)):
            row = table[layer]
            in_use = np.flatnonzero(row >= 0).tolist()
            for _ in range(draw.randint(1, 3) if len(in_use) > 1 else 0):
                one, other = draw.sample(in_use, 2)
                row[one], row[other] = row[other], row[one]
            for _ in range(draw.randint(0, 2)):
                slot = draw.choice(in_use)
                if (row == row[slot]).sum() > 1:
                    row[slot] = draw.randrange(current.num_logical_experts)
        return ExpertMap(table, current.num_logical_experts, current.topology)


def _no_judgement(load: ExpertLoad, current: ExpertMap, planned: ExpertMap) -> None:
    """A random map promises nothing."""


def _judge_plan(
    violate: Callable[[str], None],
    rules: AlgorithmPlanner,
    load: ExpertLoad,
    current: ExpertMap,
    planned: ExpertMap,
) -> None:
    """A layer moves only for a gain; what stays on its rank keeps its slot; no rank holds an expert twice; a
    map survives what it is to.
    """
    survive = _possible_survival(rules.survive, current)
    survived, survive_after = survives(current, survive), survives(planned, survive)
    if not survive_after.all():
        violate(f"layers {np.flatnonzero(~survive_after).tolist()} do not survive the loss of a {survive}")
    before, after = current.by_rank(), planned.by_rank()
    moves = (before != after).any(axis=(1, 2))
    balancedness = window_balancedness(current, load)
    gains = (window_balancedness(planned, load) > balancedness) & (balancedness < rules.min_balancedness)
    gains |= survive_after & ~survived
    if (moves & ~gains).any():
        violate(f"layers {np.flatnonzero(moves & ~gains).tolist()} move without a gain")
    if planned.same_rank_replicas[moves].any():
        violate("a rank gets two replicas of one expert")
    for layer in np.flatnonzero(moves).tolist():
        for rank, (old, new) in enumerate(zip(before[layer], after[layer], strict=True)):
            kept = sum(min((old == expert).sum(), (new == expert).sum()) for expert in np.unique(old))
            if (old == new).sum() < kept:
                violate(f"layer {layer}, rank {rank}: an expert that stays changes its slot")
                return


def _possible_survival(survive: Survival, current: ExpertMap) -> Survival:
    """What the active ranks have slots for."""
    try:
        check_survival(survive, current.num_logical_experts, current.num_physical_experts, current.topology)
    except ValueError:
        return "none"
    return survive


class SimulatedTracer:
    """A load trace in memory, compared pass by pass with what was served."""

    def __init__(self, engine: Engine) -> None:
        self.num_steps = 0
        self._engine = engine
        self._next = 0

    def open(self) -> None:
        pass

    async def add(self, load: NDArray[np.int64], phase: NDArray[np.uint8]) -> None:
        engine = self._engine
        for row in load:
            self.num_steps += 1
            if not engine.counts_all:
                if not engine.is_served(row):
                    engine.violate("the load trace has tokens that were never served")
                continue
            if self.num_steps == 1 and engine.scenario.counts_late:
                continue  # in the first pass nothing was there yet
            while self._next < engine.step:
                one = engine.passes[self._next]
                self._next += 1
                if not one.is_dummy.all():
                    break
            tokens = int((one.tokens * ~one.is_dummy).sum())
            if not (row == tokens * engine.basic_load).all():
                engine.violate(f"the load trace has other tokens than pass {self._next}")
                return

    async def publish(self, *, is_last: bool) -> None:
        pass

    def close(self) -> None:
        pass


def _nonsense(current: ExpertMap, draw: random.Random) -> ExpertMap:
    """A map of another shape."""
    if draw.random() < 0.5 or current.num_layers == 1:
        table = np.concatenate([current.physical_to_logical] * 2)
    else:
        table = current.physical_to_logical[:-1]
    return ExpertMap(table, current.num_logical_experts, current.topology)


class SimulatedRecorder:
    """The record of the expert map: a file where there is a folder for it, else kept in memory.

    on_write: called with the map whenever the file is replaced, which all ranks share
    """

    def __init__(
        self, path: Path | None, injected: Callable[[str], None], on_write: Callable[[ExpertMap], None]
    ) -> None:
        self.path = path
        self._on_write = on_write
        self.fault = ""
        self.recorded: ExpertMap | None = None
        self._injected = injected

    async def record(self, expert_map: ExpertMap, *, keep_earlier: bool) -> None:
        if keep_earlier and self.recorded is not None:
            return
        fault, self.fault = self.fault, ""
        if fault:
            self._injected(fault)
            raise RecordError(self.path or Path("map.json"), Fault("", fault))
        if self.path is not None:
            expert_map.save(self.path)
        self._on_write(expert_map)
        self.recorded = expert_map
