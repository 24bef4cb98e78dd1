"""One balancing cycle on one rank: collect, plan, transfer, commit, record.

Every rank runs the same cycle in its background thread. Ranks meet at agreed places before they enter an
operation of the group, so that a rank that failed earlier never leaves others inside one. Whatever goes
wrong, the cycle ends on every rank and the map in force stays.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from eplb_platform.balance import mean_over_max, moved_experts, window_balancedness, window_rank_load
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Chunk, build_schedule, unmoved
from eplb_platform.records import RecordError
from eplb_platform.runtime.actions import Commit, EnqueueExchange, OpenExchange
from eplb_platform.runtime.agreement import Agreement, CycleAborted, fingerprint, same
from eplb_platform.runtime.forward_agreement import ForwardAgreement
from eplb_platform.runtime.gate import ActionsDropped, ForwardGate
from eplb_platform.runtime.ports import (
    Clock,
    ComputeCosts,
    ControlPlane,
    CostRecorder,
    ExpertLoad,
    Group,
    Planner,
    Recorder,
    Tracer,
)
from eplb_platform.runtime.step_loads import StepLoads
from eplb_platform.runtime.watchdog import Waiting
from eplb_platform.runtime.weighting import RoutingTables, worth_reweighing

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)


class Stage(StrEnum):
    """Where a cycle is; the names that logs, `Balancer.state` and stage observers use."""

    START = "start"
    REBUILD = "rebuild"
    COLLECT = "collect"
    TRACE = "trace"
    PLAN = "plan"
    BROADCAST = "broadcast"
    COMPARE = "compare"
    SCHEDULE = "schedule"
    FETCH = "fetch"
    AGREE = "agree"
    COMMIT = "commit"
    RECORD = "record"


class Outcome(StrEnum):
    """How a cycle ended."""

    MOVED = "moved"
    STAYED = "stayed"
    NO_LOAD = "no load"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True)
class CycleRules:
    """What the configuration says about a cycle."""

    moves_experts: bool
    plans: bool
    """False where the load is only observed."""
    layers_per_chunk: int
    staging_slots: int
    commit_margin_steps: int
    timeout_s: float
    first_commit_after_steps: int

    def digest(self) -> str:
        """32 hexadecimal digits: ranks that follow different rules would cut one plan into other chunks."""
        return blake2b(repr(self).encode(), digest_size=16).hexdigest()


@dataclass
class CycleReport:
    """What one cycle did on this rank."""

    number: int
    outcome: Outcome = Outcome.STAYED
    reason: str = ""
    chunks_committed: int = 0
    moved_experts: int = 0
    skipped_layers: tuple[int, ...] = ()
    record_error: str = ""
    trace_error: str = ""
    rank_load: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    """Mean and maximum over ranks, [layers] each, of the map in force on the collected load; on the rank that
    plans."""
    planned_balancedness: NDArray[np.float64] | None = None
    """[layers], of the planned map on the same load."""
    time_balancedness: NDArray[np.float64] | None = None
    """[layers], of the time that experts took by their measured cost, for the map in force; on the rank that
    plans, where it is measured."""
    planned_time_balancedness: NDArray[np.float64] | None = None
    cost_error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def balancedness(self) -> NDArray[np.float64] | None:
        """[layers], of `rank_load`."""
        return None if self.rank_load is None else mean_over_max(*self.rank_load)


class Heat(Protocol):
    """The expert load that this rank has collected, safe to read from the background thread."""

    def completed_windows(self) -> int:
        """How many windows have been completed since the start."""
        ...

    def windows_until(self, end: int) -> NDArray[np.int64]:
        """The last windows up to number `end`: [windows, layers, logical], the same shape on every rank."""
        ...


@dataclass
class RankLink:
    """One rank's lasting link to the others; it outlives cycles.

    members: the active ranks, ascending; all of them by default
    generation: counts the changes of members; keys of different ones never meet
    """

    rank: int
    num_ranks: int
    plane: ControlPlane
    group: Group
    clock: Clock
    gate: ForwardGate
    epoch: int = 0
    wanted_epoch: int = 0
    open_epoch: int = 0
    """Of the device's group, where the forward thread makes it."""
    finished_keys: Sequence[str] = ()
    untold: list[tuple[Agreement, str]] = field(default_factory=list)
    """Cycles that failed here while the store was out of reach, and why: others may wait in them for ever."""
    members: Sequence[int] = ()
    generation: int = 0

    def __post_init__(self) -> None:
        self.members = tuple(self.members) or tuple(range(self.num_ranks))

    @property
    def planning_rank(self) -> int:
        """The rank that plans and records."""
        return self.members[0]

    @property
    def plans(self) -> bool:
        """Whether this is the rank that plans and records."""
        return self.rank == self.planning_rank

    def scope(self, name: str) -> str:
        """Where the keys of `name` lie in this generation."""
        return f"generation/{self.generation}/{name}" if self.generation else name

    def break_group(self) -> None:
        """End what is pending in the group and ask for a new one at the next cycle's start."""
        self.wanted_epoch = self.epoch + 1
        self.group.abort()


class Cycle:
    """One cycle on one rank. `run` never raises: it reports."""

    def __init__(
        self,
        number: int,
        link: RankLink,
        rules: CycleRules,
        *,
        heat: Heat,
        planner: Planner,
        recorder: Recorder | None,
        step_loads: StepLoads | None,
        tracer: Tracer | None,
        expert_map: ExpertMap,
        tables: RoutingTables | None,
        is_ending: Callable[[], str],
        on_stage: Callable[[Stage], None],
        on_wait: Callable[[Waiting | None], None] | None = None,
        costs: ComputeCosts | None = None,
        cost_recorder: CostRecorder | None = None,
        record_objection: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        self.report = CycleReport(number)
        self._link = link
        self._rules = rules
        self._heat = heat
        self._planner = planner
        self._recorder = recorder
        self._step_loads = step_loads
        self._tracer = tracer
        self._record_objection = record_objection
        self._map = expert_map
        self._tables = tables
        self._is_ending = is_ending
        self._costs = costs
        self._cost_recorder = cost_recorder
        self._on_stage = on_stage
        self._started_at_boundary = link.gate.boundary
        self._stage = Stage.START
        self._in_group = False
        self._places = Agreement(
            link.plane,
            link.clock,
            scope=link.scope(f"cycle/{number}"),
            rank=link.rank,
            ranks=link.members,
            is_ending=is_ending,
            on_wait=on_wait,
        )
        self._forward = ForwardAgreement(
            link, self._places, margin_steps=rules.commit_margin_steps, timeout_s=rules.timeout_s
        )

    async def run(self) -> CycleReport:
        """Take part in the cycle until it ends on this rank."""
        try:
            await self._run()
        except ActionsDropped as dropped:
            await self._end(str(dropped), Outcome.CANCELLED)
        except CycleAborted as aborted:
            await self._end(str(aborted), _outcome_of(aborted))
        except Exception as error:
            reason = f"rank {self._link.rank}: {self._stage}: {type(error).__name__}: {error}"
            ended = await self._announce(reason)
            await self._end(str(ended), _outcome_of(ended))
        finally:
            self._link.finished_keys = [*self._link.finished_keys, *self._places.keys]
        return self.report

    async def _run(self) -> None:
        await self._start()
        load = await self._collect()
        if self._step_loads is not None:
            await self._trace(self._step_loads)
        if not load.any():
            self.report.outcome = Outcome.NO_LOAD
            await self._record(self._map, keep_earlier=not self._rules.moves_experts)
            return
        if self._link.plans:
            self.report.rank_load = self._rank_load(load)
            self.report.time_balancedness = self._time_balancedness(self._map, self._tables, load)
        await self._record_cost()
        if not self._rules.plans:
            return
        weighed = load if self._costs is None else self._costs.weigh(load)
        planned, aim = await self._plan(load, weighed)
        if aim is not None and self._tables is not None:
            reweighed = worth_reweighing(self._map, planned, self._tables, aim, weighed)
            if reweighed:
                await self._move(
                    "weights", unmoved(reweighed, self._map), self._tables.with_layers(reweighed, aim)
                )
        if self._rules.moves_experts and planned != self._map:
            await self._rearrange(planned, aim)
        await self._record(self._map if self._rules.moves_experts else planned)

    # --- the stages, in their order ---

    async def _start(self) -> None:
        link, stale = self._link, self._link.finished_keys
        with self._timed(Stage.START):
            while link.untold:
                places, reason = link.untold[0]
                await places.announce_failure(reason)
                link.untold.pop(0)
            epoch = await self._places.agree("start", link.wanted_epoch, max)
            link.finished_keys = ()
            await link.plane.forget(stale)
        if epoch > link.epoch:
            with self._inside_group(), self._timed(Stage.REBUILD):
                link.epoch = link.wanted_epoch = epoch
                await link.group.rebuild(epoch, link.members)
        if link.group.enqueues_on_forward and link.open_epoch != link.epoch:
            with self._inside_group(), self._timed(Stage.REBUILD):
                await self._forward.execute_together("open", OpenExchange(epoch), self._note_open)

    async def _note_open(self) -> None:
        self._link.open_epoch = self._link.epoch

    async def _collect(self) -> NDArray[np.int64]:
        with self._timed(Stage.COLLECT):
            end = await self._places.agree(
                "collect", self._heat.completed_windows(), min, timeout_s=self._timeout_s
            )
            measured = None if self._costs is None else self._costs.totals()
            with self._inside_group():
                load = await self._link.group.sum(self._heat.windows_until(end))
                if self._costs is not None and measured is not None:
                    self._costs.learn(await self._link.group.sum(measured))
            return load

    async def _trace(self, loads: StepLoads) -> None:
        """Add up the passes that all ranks have and the trace has not; with bounded memory."""
        with self._timed(Stage.TRACE):
            first, end = loads.kept()
            first = await self._places.agree("trace/first", first, max, timeout_s=self._timeout_s)
            end = await self._places.agree("trace/end", end, min, timeout_s=self._timeout_s)
            is_last = loads.is_complete and end == loads.kept()[1]
            with self._inside_group():
                for start in range(first, end, loads.block_steps):
                    block = loads.block(start, min(end, start + loads.block_steps))
                    total = await self._link.group.sum(block)
                    if self._tracer is not None and self._link.plans:
                        await self._write_trace(self._tracer.add(*loads.rows(total)))
            loads.forget_until(end)
            if lost := loads.take_lost():
                self.report.trace_error = f"{lost} steps came too long before a cycle and are missing"
            if self._tracer is not None and self._link.plans:
                await self._write_trace(self._tracer.publish(is_last=is_last))

    async def _write_trace(self, writing: Awaitable[None]) -> None:
        """A trace that cannot be written is reported; it ends no cycle."""
        try:
            await writing
        except RecordError as error:
            self.report.trace_error = str(error)

    async def _plan(
        self, load: NDArray[np.int64], weighed: ExpertLoad
    ) -> tuple[ExpertMap, RoutingTables | None]:
        """The map to move to, and the tables to route by there.

        weighed: `load`, with what tokens cost where that is measured
        """
        current = planned = self._map
        with self._timed(Stage.PLAN):
            if self._link.plans:
                planned = await self._planner.plan(weighed, current)
                _check_plan(planned, current)
                self.report.planned_balancedness = window_balancedness(planned, load)
            moves = await self._places.agree("plan", int(planned != current), max, timeout_s=self._timeout_s)
        if moves:
            with self._inside_group(), self._timed(Stage.BROADCAST):
                planned = await self._broadcast(planned)
        with self._timed(Stage.COMPARE):
            aim = None if self._tables is None else RoutingTables.level(planned, weighed, self._tables.width)
            if aim is not None and self._link.plans:
                self.report.planned_balancedness = mean_over_max(*aim.window_rank_load(planned, load))
            if self._link.plans:
                self.report.planned_time_balancedness = self._time_balancedness(planned, aim, load)
            compared = (self._rules, current, planned, *(() if aim is None else (aim,)))
            await self._places.agree("compare", fingerprint(*compared), same, timeout_s=self._timeout_s)
        return planned, aim

    def _rank_load(self, load: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and maximum over ranks of what is in force, [layers] each."""
        if self._tables is None:
            return window_rank_load(self._map, load)
        return self._tables.window_rank_load(self._map, load)

    def _time_balancedness(
        self, expert_map: ExpertMap, tables: RoutingTables | None, load: NDArray[np.int64]
    ) -> NDArray[np.float64] | None:
        """[layers], of the time that this load takes; None where that is not measured."""
        spent = None if self._costs is None else self._costs.time_load(load)
        if spent is None:
            return None
        if tables is None:
            return window_balancedness(expert_map, spent)
        return mean_over_max(*tables.window_rank_load(expert_map, spent))

    async def _record_cost(self) -> None:
        """A file that cannot be written is reported; it ends no cycle."""
        if self._costs is None or self._cost_recorder is None or not self._link.plans:
            return
        self.report.cost_error = await self._objection()
        if self.report.cost_error:
            return
        try:
            await self._cost_recorder.record(self._costs.cost)
        except RecordError as error:
            self.report.cost_error = str(error)

    async def _broadcast(self, planned: ExpertMap) -> ExpertMap:
        slots = planned.physical_to_logical.astype(np.int64)
        slots = await self._link.group.broadcast(slots, self._link.planning_rank)
        return _received_map(slots, planned)

    async def _rearrange(self, planned: ExpertMap, aim: RoutingTables | None) -> None:
        with self._timed(Stage.SCHEDULE):
            schedule = build_schedule(
                self._map,
                planned,
                layers_per_chunk=self._rules.layers_per_chunk,
                staging_slots=self._rules.staging_slots,
            )
        self.report.skipped_layers = schedule.skipped_layers
        for index, chunk in enumerate(schedule.chunks):
            await self._move(f"chunk/{index}", chunk, self._tables_after(chunk, planned, aim))

    def _tables_after(
        self, chunk: Chunk, planned: ExpertMap, aim: RoutingTables | None
    ) -> RoutingTables | None:
        """A layer that is only part of its way is routed evenly until it arrives."""
        if aim is None or self._tables is None:
            return None
        after = chunk.map_after.physical_to_logical
        arrived = [
            layer for layer in chunk.layers if (after[layer] == planned.physical_to_logical[layer]).all()
        ]
        even = RoutingTables.even(chunk.map_after, aim.width)
        return self._tables.with_layers(chunk.layers, even).with_layers(arrived, aim)

    async def _move(self, place: str, chunk: Chunk, tables: RoutingTables | None) -> None:
        with self._timed(Stage.FETCH):
            # Others come here only after their own commit of the chunk before, and an idle engine commits
            # nothing.
            await self._places.agree(f"{place}/ready")
            with self._inside_group():
                await self._bring(place, chunk)
            chunk.map_after.derive_tables()  # here, so that the forward thread finds them at the commit
        with self._timed(Stage.AGREE):
            await self._places.agree(f"{place}/staged", timeout_s=self._timeout_s)
            not_before = self._started_at_boundary + self._rules.first_commit_after_steps
            await self._forward.agree(f"{place}/commit", Commit(chunk, tables), not_before=not_before)
        try:
            with self._timed(Stage.COMMIT):
                await self._forward.until_executed()  # the staging is in use until then
        except (ActionsDropped, CycleAborted):
            raise
        except Exception:  # the commit comes whatever fails here, and the next cycle must start from it
            await self._forward.until_executed()
            self._count_commit(chunk, tables)
            raise
        self._count_commit(chunk, tables)

    def _count_commit(self, chunk: Chunk, tables: RoutingTables | None) -> None:
        """The forward thread has executed it."""
        self.report.outcome = Outcome.MOVED
        self.report.chunks_committed += 1
        self.report.moved_experts += int(moved_experts(self._map, chunk.map_after).sum())
        self._map, self._tables = chunk.map_after, tables

    async def _bring(self, place: str, chunk: Chunk) -> None:
        """This rank's new experts of `chunk` into its staging."""
        group = self._link.group
        if group.enqueues_on_forward and chunk.crosses_ranks:
            await group.prepare(chunk)
            await self._forward.execute_together(
                f"{place}/enqueue", EnqueueExchange(chunk), lambda: group.arrive(chunk)
            )
        else:
            await group.fetch(chunk)

    async def _record(self, expert_map: ExpertMap, *, keep_earlier: bool = False) -> None:
        """A record that cannot be written is reported; it ends no cycle."""
        if self._recorder is None or not self._link.plans:
            return
        with self._timed(Stage.RECORD):
            self.report.record_error = await self._objection()
            if self.report.record_error:
                return
            try:
                await self._recorder.record(expert_map, keep_earlier=keep_earlier)
            except RecordError as error:
                self.report.record_error = str(error)

    async def _objection(self) -> str:
        """Why this rank must not write over a file; empty where it may."""
        return "" if self._record_objection is None else await self._record_objection()

    # --- how a cycle ends early ---

    async def _announce(self, reason: str) -> CycleAborted:
        """Tell the others first, then close the group: the reason they see is the true one.

        Returns the end that stands: where another rank left first, an error here is what came of it.
        """
        ended = CycleAborted(reason, is_cancelled=False)
        try:
            ended = await self._places.announce_failure(reason)
        except Exception as error:
            logger.error("cycle %d: cannot tell the other ranks yet: %s", self.report.number, error)
            self._link.untold.append((self._places, reason))
        if self._in_group:
            self._link.break_group()
        return ended

    async def _end(self, reason: str, outcome: Outcome) -> None:
        self.report.reason, self.report.outcome = reason, outcome
        if self.report.chunks_committed:  # so that the record shows the map in force
            try:
                await self._record(self._map)
            except Exception as error:  # what ended the cycle is the reason that counts
                self.report.record_error = f"{type(error).__name__}: {error}"

    # --- bookkeeping ---

    @property
    def _timeout_s(self) -> float:
        return self._rules.timeout_s

    @contextmanager
    def _timed(self, stage: Stage) -> Iterator[None]:
        self._stage = stage
        started = self._link.clock.now()
        self._on_stage(stage)
        try:
            yield
        finally:
            spent = self.report.seconds.get(stage, 0.0) + self._link.clock.now() - started
            self.report.seconds[stage] = spent

    @contextmanager
    def _inside_group(self) -> Iterator[None]:
        """Others wait for this rank inside the group; an error that leaves the block must close the group."""
        self._in_group = True
        yield
        self._in_group = False


def _check_plan(planned: object, current: ExpertMap) -> None:
    """Raises ValueError for what no cycle can move to: a planner may be anybody's."""
    if not isinstance(planned, ExpertMap):
        raise ValueError(f"the planner returned {type(planned).__name__}, expected an ExpertMap")
    if (
        planned.physical_to_logical.shape != current.physical_to_logical.shape
        or planned.num_logical_experts != current.num_logical_experts
        or planned.topology != current.topology
    ):
        raise ValueError(f"the planner returned {planned!r}, expected one like {current!r}")


def _received_map(slots: NDArray[np.int64], like: ExpertMap) -> ExpertMap:
    return ExpertMap(slots, like.num_logical_experts, like.topology)


def _outcome_of(aborted: CycleAborted) -> Outcome:
    return Outcome.CANCELLED if aborted.is_cancelled else Outcome.FAILED
