"""The one thread that runs every rank: tasks are coroutines, time is a number, a seed chooses."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Any

WAKE_S = 2e-5
"""A task that is woken goes on within so many seconds, in an order that the seed chooses."""


class Stuck(RuntimeError):
    """Nothing is left to happen, and somebody still waits for it."""


@dataclass(eq=False, slots=True)
class Task:
    """One thread of one simulated rank."""

    rank: int
    name: str
    coroutine: Coroutine[Any, Any, None]
    is_done: bool = False
    error: Exception | None = None
    is_parked: bool = False
    turn: int = 0
    """Counts resumptions: an event that was meant for an earlier one is void."""
    looked_for: list[str] = field(default_factory=list)
    """Keys of the store that it found missing since it last went to sleep."""


class _Suspension:
    """Gives the turn back to the scheduler once; without a frame of its own, since there are so many."""

    __await__ = partial(iter, (None,))


_SUSPENDED: Awaitable[None] = _Suspension()


class Scheduler:
    """Events in order of time; equal seeds give equal runs.

    limit_s: simulated seconds after which `run` raises `Stuck`
    """

    def __init__(self, seed: int, limit_s: float = 1e6) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.current: Task | None = None
        self.events = 0
        """Events so far."""
        self._limit_s = limit_s
        self._queue: list[tuple[float, int, Task | Callable[[], None], int]] = []
        self._number = 0
        self._is_stopped = False
        self._frozen: dict[int, float] = {}

    def spawn(self, rank: int, name: str, coroutine: Coroutine[Any, Any, None]) -> Task:
        """Run `coroutine` as a thread of `rank`, soon."""
        task = Task(rank, name, coroutine)
        self._resume_at(self.now + WAKE_S * self.random.random(), task)
        return task

    def kill(self, task: Task) -> None:
        """The task never goes on."""
        if not task.is_done:
            task.is_done, task.is_parked = True, False
            task.turn += 1
            task.coroutine.close()

    def freeze(self, rank: int, seconds: float) -> None:
        """No thread of `rank` goes on for `seconds`, as after SIGSTOP; its clock does."""
        self._frozen[rank] = max(self._frozen.get(rank, 0.0), self.now + seconds)

    def call_at(self, time: float, action: Callable[[], None]) -> None:
        """Call `action` at `time`."""
        self._number += 1
        heappush(self._queue, (time, self._number, action, 0))

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Let the current task, which awaits this at once, go on `seconds` later, whoever wakes it."""
        task = self.current
        assert task is not None
        self._number += 1
        heappush(self._queue, (self.now + seconds, self._number, task, task.turn))
        return _SUSPENDED

    def park(self, timeout_s: float | None) -> Awaitable[None]:
        """Let the current task, which awaits this at once, go on when it is woken, or after `timeout_s`
        seconds.
        """
        task = self.current
        assert task is not None
        task.is_parked = True
        if timeout_s is not None:
            self._resume_at(self.now + timeout_s, task)
        return _SUSPENDED

    def wake(self, task: Task) -> None:
        """A parked task goes on soon; any other is left alone."""
        if task.is_parked:
            task.is_parked = False
            self._resume_at(self.now + WAKE_S * self.random.random(), task)

    def wake_at(self, time: float, task: Task) -> None:
        """A parked task goes on at `time`, whatever happens before."""
        if task.is_parked:
            task.is_parked = False
            self._resume_at(time, task)

    def stop(self) -> None:
        """Let `run` return after the current event."""
        self._is_stopped = True

    def run(self) -> None:
        """Let time pass until `stop` is called. Raises `Stuck` when that cannot happen any more."""
        queue, frozen = self._queue, self._frozen
        while not self._is_stopped:
            if not queue:
                raise Stuck("nothing is left to happen")
            time, _, what, turn = heappop(queue)
            if time > self._limit_s:
                raise Stuck(f"no end within {self._limit_s:g} simulated seconds")
            self.now = time
            self.events += 1
            if not isinstance(what, Task):
                what()
                continue
            if turn != what.turn or (frozen and self._is_frozen(what)):
                continue
            what.turn += 1
            what.is_parked = False
            self.current = what
            try:
                what.coroutine.send(None)
            except StopIteration:
                what.is_done = True
            except Exception as error:
                what.is_done, what.error = True, error
            self.current = None

    def _is_frozen(self, task: Task) -> bool:
        """Whether the task has to wait for its rank; it goes on then."""
        thaw = self._frozen.get(task.rank)
        if thaw is None or thaw <= self.now:
            return False
        self._number += 1
        heappush(self._queue, (thaw + WAKE_S * self.random.random(), self._number, task, task.turn))
        return True

    def _resume_at(self, time: float, task: Task) -> None:
        if self.current is not task:
            task.turn += 1
        self._number += 1
        turn = task.turn
        heappush(self._queue, (time, self._number, task, turn))
