"""The group: operations in which ranks meet, each with the group's own time-out, broken as a whole when one
rank breaks it.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_platform.backend import GroupError
from eplb_platform.migration.schedule import Chunk
from eplb_platform.runtime.ports import Group
from eplb_platform.testing.cluster.scheduler import Scheduler, Task

if TYPE_CHECKING:
    from eplb_platform.migration.transfer import Migrator
    from eplb_platform.testing.cluster.weights import TagMemory

ALL = "all"
TRANSFER_S = 1e-3
"""Mean time of an operation once every rank it needs is in it."""


@dataclass
class _Operation:
    """One place in the order of a group's operations."""

    kind: str
    arrived: dict[int, object] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    waiting: dict[str, list[Task]] = field(default_factory=dict)
    """By what they wait for first, so that not every arrival wakes everybody."""
    total: NDArray[np.int64] | None = None


@dataclass
class Network:
    """What the groups of all ranks share."""

    scheduler: Scheduler
    broken: set[int] = field(default_factory=set)
    """Epochs whose group is closed."""
    operations: dict[tuple[int, int], _Operation] = field(default_factory=dict)
    """By epoch and number; what forward threads enqueued has numbers below 0."""
    memories: dict[int, TagMemory] = field(default_factory=dict)
    boundaries: dict[str, int] = field(default_factory=dict)
    """The pass after which a forward thread gave the device's group something."""

    def close(self, epoch: int) -> None:
        """End what is pending in the group of `epoch`."""
        self.broken.add(epoch)
        for (of, _), operation in self.operations.items():
            if of == epoch:
                for event in list(operation.waiting):
                    self.wake(operation, event)

    def wake(self, operation: _Operation, event: str) -> None:
        """Those who wait for `event` look again."""
        for task in operation.waiting.pop(event, ()):
            self.scheduler.wake(task)

    def take_up(
        self, epoch: int, number: int, kind: str, rank: int, content: object, size: int
    ) -> _Operation:
        """`rank` comes to operation `number` of its group, which has so many ranks."""
        operation = self.operations.setdefault((epoch, number), _Operation(kind))
        older = number - 3 if number >= 0 else number + 3
        if (older < 0) == (number < 0):
            self.operations.pop((epoch, older), None)
        if operation.kind != kind:
            self.close(epoch)
            raise GroupError(f"rank {rank} is in {kind}, others are in {operation.kind}")
        operation.arrived[rank] = content
        self.wake(operation, f"arrival {rank}")
        if len(operation.arrived) == size:
            self.wake(operation, ALL)
        return operation


@dataclass
class GroupFaults:
    """What goes wrong in this rank's next operations."""

    error_in: dict[str, str] = field(default_factory=dict)
    """By the operation's name: what is raised instead of taking part."""
    never_finishes: set[str] = field(default_factory=set)
    """Operations that this rank enters without ever moving a byte."""
    flip_plan: bool = False
    """One number of the next broadcast arrives changed."""


class SimulatedGroup(Group):
    """One rank's end of the group.

    ranks: that are in the group at the start
    is_device_group: whether the forward thread has to enqueue exchanges
    on_call: called before each operation; injected(kind): called when a fault of `faults` takes effect
    step: the number of the pass that has ended
    at_place: awaited in each operation, with its name
    """

    def __init__(
        self,
        network: Network,
        rank: int,
        memory: TagMemory,
        migrator: Migrator | None,
        draw: random.Random,
        *,
        ranks: Sequence[int],
        timeout_s: float,
        is_device_group: bool,
        on_call: Callable[[], None],
        injected: Callable[[str], None],
        violate: Callable[[str], None],
        step: Callable[[], int],
        at_place: Callable[[str], Awaitable[None]],
    ) -> None:
        self._at_place = at_place
        self.faults = GroupFaults()
        self.epoch = 0
        self._network = network
        self._ranks = tuple(ranks)
        self._rank = rank
        self._memory = memory
        self._migrator = migrator
        self._random = draw
        self._timeout_s = timeout_s
        self._on_call = on_call
        self._injected = injected
        self._violate = violate
        self._step_of = step
        self._number = 0
        self._enqueued = 0
        self._number_of: dict[int, int] = {}
        """Of the exchanges that are enqueued, by their chunk."""
        self.is_device_group = is_device_group

    async def rebuild(self, epoch: int, ranks: Sequence[int]) -> None:
        self.epoch, self._number, self._enqueued = epoch, 0, 0
        self._ranks = tuple(ranks)
        operation = await self._together("rebuild", self._ranks)
        if set(operation.arrived.values()) != {self._ranks}:
            self._violate(f"rank {self._rank}: the group of epoch {epoch} is one of other ranks elsewhere")

    @contextmanager
    def lent(self, migrator: Migrator) -> Iterator[Migrator]:
        """As `BackendGroup.lent`."""
        self._migrator = migrator
        try:
            yield migrator
        finally:
            self._migrator = None

    async def sum(self, load: NDArray[np.int64]) -> NDArray[np.int64]:
        operation = await self._together("sum", load)
        if operation.total is None:
            operation.total = _total(list(operation.arrived.values()))
        return operation.total.copy()

    async def broadcast(self, values: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        operation = await self._together("broadcast", values)
        sent = operation.arrived[source]
        assert isinstance(sent, np.ndarray)
        if sent.shape != values.shape:
            self.abort()
            raise GroupError(f"rank {self._rank} expects {values.shape}, rank {source} sends {sent.shape}")
        received = sent.copy()
        if self.faults.flip_plan and source != self._rank:
            self.faults.flip_plan = False
            self._injected("plan differs on a rank")
            rows = received.reshape(-1, received.shape[-1])
            row = rows[self._random.randrange(len(rows))]
            first, second = self._random.sample(range(len(row)), 2)
            row[[first, second]] = row[[second, first]]
        return received

    async def fetch(self, chunk: Chunk) -> None:
        migrator = self._moving()
        await self._enter("fetch")
        operation = self._network.take_up(
            self.epoch, self._number, "fetch", self._rank, chunk, len(self._ranks)
        )
        self._number += 1
        sources = set(chunk.receives_of(self._rank).peer.tolist()) - {self._rank, -1}
        targets = set(chunk.sends_of(self._rank).peer.tolist())
        try:
            await self._wait(operation, lambda: _first("arrival", sources | targets, operation.arrived))
            self._memory.arriving = operation.arrived
            migrator.fetch(chunk)
            operation.finished.add(self._rank)
            self._network.wake(operation, f"end {self._rank}")
            await self._wait(operation, lambda: _first("end", targets, operation.finished))
        except GroupError:
            self.abort()
            raise
        await self._verify(chunk)

    @property
    def enqueues_on_forward(self) -> bool:
        return self.is_device_group and self._migrator is not None

    def open_exchange(self, epoch: int) -> None:
        self._check_open()  # of ranks that went on without this one
        self._check_boundary(f"open {epoch}")

    async def prepare(self, chunk: Chunk) -> None:
        await self._enter("prepare")
        self._moving().prepare(chunk)

    def enqueue(self, chunk: Chunk) -> None:
        self._check_open()
        self._check_boundary(f"enqueue {self.epoch}/{self._enqueued}")
        self._number_of[id(chunk)] = self._enqueued
        number = -1 - self._enqueued
        self._network.take_up(self.epoch, number, "enqueue", self._rank, chunk, len(self._ranks))
        self._enqueued += 1
        self._moving().enqueue(chunk)

    async def arrive(self, chunk: Chunk) -> None:
        """The device does the exchange once both ends of each pair have enqueued it."""
        await self._enter("fetch")
        number = self._number_of.pop(id(chunk))
        operation = self._network.operations[self.epoch, -1 - number]
        sources = set(chunk.receives_of(self._rank).peer.tolist()) - {self._rank, -1}
        targets = set(chunk.sends_of(self._rank).peer.tolist())
        try:
            await self._wait(operation, lambda: _first("arrival", sources | targets, operation.arrived))
            self._memory.arriving = operation.arrived
            self._memory.finish_enqueued()
            operation.finished.add(self._rank)
            self._network.wake(operation, f"end {self._rank}")
            await self._wait(operation, lambda: _first("end", targets, operation.finished))
        except GroupError:
            self.abort()
            raise
        await self._verify(chunk)

    async def _verify(self, chunk: Chunk) -> None:
        """The migrator's own comparison, which adds up over all ranks: once to hear what it would send, and
        once with the sum.
        """
        if not (self._memory.verifies and chunk.crosses_ranks):
            return
        self._memory.total = None
        self._moving().verify(chunk)
        self._memory.total = await self.sum(self._memory.differences)
        self._moving().verify(chunk)

    def _moving(self) -> Migrator:
        if self._migrator is None:
            raise RuntimeError("this balancer observes only and cannot move experts")
        return self._migrator

    def _check_boundary(self, what: str) -> None:
        """What the device's group gets, it gets from every rank after the same pass."""
        step = self._step_of()
        if self._network.boundaries.setdefault(what, step) != step:
            self._violate(f"rank {self._rank}: {what} after pass {step}, others after another one")

    def abort(self) -> None:
        self._network.close(self.epoch)

    async def _together(self, kind: str, content: object) -> _Operation:
        """All ranks come to the same operation."""
        await self._enter(kind)
        size = len(self._ranks)
        operation = self._network.take_up(self.epoch, self._number, kind, self._rank, content, size)
        self._number += 1
        await self._wait(operation, lambda: "" if len(operation.arrived) == size else ALL)
        return operation

    async def _enter(self, kind: str) -> None:
        self._on_call()
        await self._at_place(kind)
        if (reason := self.faults.error_in.pop(kind, None)) is not None:
            self._injected(f"error in {kind}")
            self.abort()
            raise GroupError(f"rank {self._rank}: {kind}: {reason}")
        if kind in self.faults.never_finishes:
            self.faults.never_finishes.discard(kind)
            self._injected(f"{kind} never finishes")
            await self._network.scheduler.sleep(self._timeout_s)
            self.abort()
            raise GroupError(f"rank {self._rank}: {kind}: not finished within {self._timeout_s:g} s")

    async def _wait(self, operation: _Operation, missing: Callable[[], str]) -> None:
        """Until nothing is `missing`. Raises GroupError when the group is broken, or not every rank comes in
        time.
        """
        scheduler, task = self._network.scheduler, self._network.scheduler.current
        assert task is not None
        deadline = scheduler.now + self._timeout_s
        while event := missing():
            self._check_open()
            if scheduler.now >= deadline:
                self.abort()
                raise GroupError(f"rank {self._rank}: {operation.kind}: not every rank came in time")
            operation.waiting.setdefault(event, []).append(task)
            await scheduler.park(deadline - scheduler.now)
        if scheduler.random.random() < 0.5:
            await scheduler.sleep(TRANSFER_S * scheduler.random.random())
            self._check_open()

    def _check_open(self) -> None:
        if self.epoch in self._network.broken:
            raise GroupError(f"rank {self._rank}: the group was closed")


def _first(event: str, ranks: set[int], present: Container[int]) -> str:
    """The event of one rank that is not present yet; empty when all are."""
    return next((f"{event} {rank}" for rank in ranks if rank not in present), "")


def _total(loads: Sequence[object]) -> NDArray[np.int64]:
    arrays = [load for load in loads if isinstance(load, np.ndarray)]
    if len({load.shape for load in arrays}) != 1:
        raise GroupError(f"shapes differ: {sorted({load.shape for load in arrays})}")
    total: NDArray[np.int64] = np.sum(arrays, axis=0)
    return total
