"""What the balancing cycle needs from the world around it.

The cycle, and what a forward thread waits for, are written as coroutines over these ports. In production a
port's coroutine blocks its thread and never suspends, so that `run_blocking` drives one to its end in one
call; a simulation hands in ports that suspend and so owns time, messages and the interleaving of a thousand
ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Chunk

Result = TypeVar("Result")
ExpertLoad: TypeAlias = NDArray[np.int64] | NDArray[np.float64]
"""Tokens, or what they count for where their cost is weighed."""


class Clock(ABC):
    """Time, and waiting for something that another thread of this rank does."""

    @abstractmethod
    def now(self) -> float:
        """Seconds from an arbitrary start; never goes back."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""

    @abstractmethod
    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until `condition` holds, which is looked at whenever the commit gate changes; whether it holds
        after at most `timeout_s` seconds (None: without a limit).
        """


class ControlPlane(ABC):
    """Small facts shared by all ranks. No method waits for another rank."""

    @abstractmethod
    async def settle(self, key: str, value: str) -> str:
        """Write `value` unless the key has one; return what stands there. First writer wins."""

    @abstractmethod
    async def read(self, key: str) -> str | None:
        """The value of `key`, or None."""

    @abstractmethod
    async def read_all(self, keys: Sequence[str]) -> list[str]:
        """The values of keys that are known to be written."""

    @abstractmethod
    async def count(self, key: str) -> int:
        """Add one to a counter and return it."""

    @abstractmethod
    async def forget(self, keys: Sequence[str]) -> None:
        """Delete keys that no rank will read again; a missing one is no error."""


class Group(ABC):
    """The backend's process group as the cycle uses it. An error here means that the group must be
    rebuilt.
    """

    @abstractmethod
    async def rebuild(self, epoch: int, ranks: Sequence[int]) -> None:
        """Replace the group by a new one of `ranks`, ascending, under `epoch`; each of them calls it."""

    @abstractmethod
    async def sum(self, load: NDArray[np.int64]) -> NDArray[np.int64]:
        """Element-wise sum over all ranks."""

    @abstractmethod
    async def broadcast(self, values: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        """The array of rank `source`."""

    @abstractmethod
    async def fetch(self, chunk: Chunk) -> None:
        """Receive this rank's new experts of `chunk` into staging and serve what others need."""

    @abstractmethod
    def abort(self) -> None:
        """End what is pending here and on the peers, `enqueue` and `open_exchange` included. Any thread."""

    # Where the forward thread has to enqueue exchanges, these take the place of `fetch`.

    @property
    def enqueues_on_forward(self) -> bool:
        """Whether exchanges are enqueued by the forward thread; the same on every rank."""
        return False

    def open_exchange(self, epoch: int) -> None:
        """Make the group that exchanges use, under `epoch`, together with every other rank, for which this
        may wait. Forward thread, between two passes.
        """
        raise NotImplementedError

    async def prepare(self, chunk: Chunk) -> None:
        """Make all ready that `enqueue` needs. Touches no staging."""
        raise NotImplementedError

    def enqueue(self, chunk: Chunk) -> None:
        """Enqueue what `fetch` would do with a prepared chunk. Forward thread; waits for nothing."""
        raise NotImplementedError

    async def arrive(self, chunk: Chunk) -> None:
        """Return once what `enqueue` enqueued is done."""
        raise NotImplementedError


class Background(ABC):
    """What a rank does beside its forward thread: one job at a time."""

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether a job is waiting or running."""

    @abstractmethod
    def start(self, job: Coroutine[None, None, None]) -> None:
        """Run a job over the ports of this rank; raises RuntimeError while another one runs or after
        `close`.
        """

    @abstractmethod
    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether no job is waiting or running, at the latest after `timeout_s` seconds."""

    @abstractmethod
    async def close(self, timeout_s: float) -> bool:
        """Let the running job end and take no other; False when it did not end within `timeout_s`
        seconds.
        """


class Planner(Protocol):
    """Makes the next expert map on the rank that plans."""

    async def plan(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        """load: [windows, layers, logical], tokens over all ranks, weighed with their cost where that is
        measured. Returns the map to move to, `current` to stay.
        """
        ...


class ComputeCosts(Protocol):
    """What experts cost, as this rank measures it and as all ranks know it after a cycle."""

    def totals(self) -> NDArray[np.int64]:
        """What this rank measured since the start, of one shape on every rank, to be added up."""
        ...

    def learn(self, totals: NDArray[np.int64]) -> None:
        """The sum of all ranks' totals."""
        ...

    def weigh(self, load: ExpertLoad) -> ExpertLoad:
        """The load to plan by, [windows, layers, logical], the same on every rank."""
        ...

    def time_load(self, load: ExpertLoad) -> ExpertLoad | None:
        """The load in proportion to the time that it takes; None when nothing was measured yet."""
        ...

    @property
    def cost(self) -> NDArray[np.float64]:
        """[layers, logical], milliseconds of a token, NaN where it is not known."""
        ...


class CostRecorder(Protocol):
    """Keeps what experts cost, on the rank that records."""

    async def record(self, cost: NDArray[np.float64]) -> None:
        """Write milliseconds of a token, [layers, logical]; raises RecordError when it cannot."""
        ...


class Recorder(Protocol):
    """Keeps what a cycle saw, on the rank that records."""

    async def record(self, expert_map: ExpertMap, *, keep_earlier: bool) -> None:
        """Write the map, unless an earlier cycle's is to be kept; raises RecordError when it cannot be
        written.
        """
        ...


class Tracer(Protocol):
    """Keeps the load of every step, on the rank that records. Each raises RecordError when it cannot."""

    @property
    def num_steps(self) -> int:
        """Steps kept so far."""
        ...

    def open(self) -> None:
        """Called once before the first pass, so that what cannot work is known early."""
        ...

    async def add(self, load: NDArray[np.int64], phase: NDArray[np.uint8]) -> None:
        """load: [steps, layers, logical], tokens over all ranks; phase: [steps], as in load traces."""
        ...

    async def publish(self, *, is_last: bool) -> None:
        """What was added is to be seen, all of it when nothing more will come."""
        ...

    def close(self) -> None:
        """Nothing more will come. Idempotent."""
        ...


def run_blocking(coroutine: Coroutine[None, None, Result]) -> Result:
    """Run a coroutine whose ports block instead of suspending."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    coroutine.close()
    raise RuntimeError("a port suspended: ports that suspend need a scheduler that owns them")
