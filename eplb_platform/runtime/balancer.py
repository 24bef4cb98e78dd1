"""The balancer that an engine calls once after every forward pass."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.records import RecordError
from eplb_platform.runtime.accounting import CycleAccounts
from eplb_platform.runtime.actions import Action, Commit, EnqueueExchange, OpenExchange
from eplb_platform.runtime.compute_profiling import ComputeProfiling
from eplb_platform.runtime.cycle import (
    Cycle,
    CycleRules,
    RankLink,
    Stage,
)
from eplb_platform.runtime.gate import ForwardStopped
from eplb_platform.runtime.locked_heat import LockedHeat
from eplb_platform.runtime.meeting import ForwardMeetings
from eplb_platform.runtime.planning import AlgorithmPlanner
from eplb_platform.runtime.ports import Background, CostRecorder, Planner, Recorder, Tracer, run_blocking
from eplb_platform.runtime.record_fence import RecordFence
from eplb_platform.runtime.resize_meeting import Presence, ResizeMeetings, Verdict
from eplb_platform.runtime.resizing import Resizing
from eplb_platform.runtime.served_model import ServedModel, WeightedModel
from eplb_platform.runtime.stats import BalancerStats
from eplb_platform.runtime.step_loads import StepLoads
from eplb_platform.runtime.watchdog import Progress
from eplb_platform.runtime.weighting import RoutingTables
from eplb_platform.runtime.whereabouts import Whereabouts
from eplb_platform.topology import Topology

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from eplb_platform.migration.schedule import Chunk
    from eplb_platform.migration.transfer import LoadExpert, Migrator

logger = logging.getLogger(__name__)

ANSWER_TIMEOUTS = 2.0
"""The forward thread waits for a decision at most this many transfer time-outs."""
RESIZE_TIMEOUTS = 4.0
"""A step of a resize waits this many: a rank may end a cycle first."""
LOOK_AGAIN_S = 0.005


class Balancer:
    """Watches one model's expert load and re-places its experts while it serves.

    Every rank of the expert-parallel group has one and calls `step` once after every forward pass, dummy
    passes included, so that all ranks count the same passes. Built by `start_balancer`. `step`, `invalidate`,
    `drain` and `close` block the forward thread while they wait; `stepping` and so on are the same as
    coroutines, for a simulation whose ports suspend.

    expert_map: what the weights follow now
    tables: what `model` routes by now, a `WeightedModel`; None where replicas always share evenly
    model_name: for the log
    lend_migrator: gives one for a resize where the configuration moves nothing else
    """

    def __init__(
        self,
        config: EplbConfig,
        model: ServedModel,
        link: RankLink,
        meetings: ForwardMeetings,
        rules: CycleRules,
        *,
        model_name: str,
        expert_map: ExpertMap,
        tables: RoutingTables | None,
        heat: LockedHeat,
        migrator: Migrator | None,
        planner: Planner,
        recorder: Recorder | None,
        step_loads: StepLoads | None,
        tracer: Tracer | None,
        background: Background,
        lend_migrator: Callable[[], AbstractContextManager[Migrator]] | None = None,
        on_stage: Callable[[Stage], None] | None = None,
        on_close: Callable[[], None] | None = None,
        profiling: ComputeProfiling | None = None,
        cost_recorder: CostRecorder | None = None,
    ) -> None:
        self.config = config
        self.stats = BalancerStats()
        self._accounts = CycleAccounts(
            self.stats, config, link,
            model_name=model_name, migrator=migrator, tracer=tracer, profiling=profiling,
        )  # fmt: skip
        self._model = model
        self._expert_map = expert_map
        self._tables = tables
        self._link = link
        self._meetings = meetings
        self._rules = rules
        self._heat = heat
        self._migrator = migrator
        self._planner = planner
        self._recorder = recorder
        self._step_loads = step_loads
        self._tracer = tracer
        self._background = background
        self._lend_migrator = lend_migrator
        self._resizes = ResizeMeetings(meetings.plane, link)
        self._fence = RecordFence(self._resizes, link, rules.timeout_s)
        self._profiling = profiling
        self._cost_recorder = cost_recorder
        self._on_close = on_close
        self._whereabouts = Whereabouts(link.clock, on_stage)
        self._map_since = link.clock.now()
        self._next_cycle = 0
        self._last_start = 0
        self._is_requested = False
        self._is_paused = False
        self._is_closed = False
        self._wish_to_end = ""
        self._resize_lock = threading.Lock()

    # --- the engine's calls, all on the forward thread ---

    def step(
        self,
        physical_load: NDArray[np.int64] | None = None,
        *,
        phase: Phase = Phase.MIXED,
        is_dummy: bool = False,
        counted_by: ExpertMap | None = None,
    ) -> None:
        """A forward pass has ended: record its load, commit what was agreed for now, start a cycle when one
        is due.

        physical_load: [layers, physical], tokens that this rank sent to each slot in the pass; None for none.
        counted_by: the map that they were sent by, where a device's counts come some passes late; by default
            the map in force.
        Raises `ForwardStopped` when this rank cannot learn whether to commit, and where it is not active: it
        must then not serve on.
        """
        run_blocking(self.stepping(physical_load, phase=phase, is_dummy=is_dummy, counted_by=counted_by))

    async def stepping(
        self,
        physical_load: NDArray[np.int64] | None = None,
        *,
        phase: Phase = Phase.MIXED,
        is_dummy: bool = False,
        counted_by: ExpertMap | None = None,
    ) -> None:
        """As `step`."""
        if not self.is_active:
            raise ForwardStopped(f"rank {self._link.rank} is not active: it serves after a `resize` with it")
        started = self._whereabouts.enter_step()
        if self._profiling is not None:
            self._profiling.end_pass()
        self.stats.steps += 1
        self.stats.dummy_steps += is_dummy
        sent_by = self._expert_map if counted_by is None else counted_by
        self._heat.record(physical_load, sent_by, phase, is_dummy)
        if self._step_loads is not None:
            self._step_loads.record(physical_load, sent_by, phase=phase, is_dummy=is_dummy)
        action = await self._pass_boundary()
        if action is not None:
            self._execute(action)
        if self._is_due():
            self._start_cycle()
        if self._profiling is not None:
            self._profiling.begin_pass(self._expert_map)
        stall = self._link.clock.now() - started
        self.stats.stall_s += stall
        self.stats.longest_stall_s = max(self.stats.longest_stall_s, stall)
        self._whereabouts.leave_step()

    def pause(self) -> None:
        """Move nothing until `resume`; a running cycle ends on every rank before its next commit is
        agreed.
        """
        self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._is_paused = False

    def start_profiling(self) -> None:
        """Measure compute time from the next pass on; on every rank. Needs `enable_expert_compute_profiling`.

        Raises RuntimeError without it.
        """
        self._measuring().profiler.start_profiling()

    def stop_profiling(self) -> None:
        """Measure no more; plans go on with what was measured. As `start_profiling`."""
        self._measuring().profiler.stop_profiling()

    def rebalance_now(self) -> None:
        """Start a cycle at the next step instead of at the end of the interval.

        Call it on every rank: a rank that was not asked joins only when its own interval ends.
        """
        self._is_requested = True

    def invalidate(self, expert_map: ExpertMap, *, timeout_s: float | None = None) -> None:
        """The engine loads its weights anew, in the places of `expert_map`: route by it from now on.

        Call it on every rank with the same map, between two passes, right before the weights are written
        (then an error leaves a model that can serve on) or right after. The running cycle ends, and a commit
        that is agreed for a later step is executed by no rank. Collected load is kept, it is in logical
        experts.

        timeout_s: how long to wait for the other ranks; the transfer time-out by default
        Raises ValueError for a map of another shape, `MeetingFailed` when not every rank came in time with
        the same map: nothing was changed on any rank then. Raises `ForwardStopped` when this rank must not
        serve on.
        """
        run_blocking(self.invalidating(expert_map, timeout_s=timeout_s))

    async def invalidating(self, expert_map: ExpertMap, *, timeout_s: float | None = None) -> None:
        """As `invalidate`."""
        self._check_shape(expert_map)
        await self._meet("invalidate", expert_map.digest(), timeout_s)
        gate = self._link.gate
        gate.drop_actions()
        await self._await_end_of_cycle("invalidate")
        gate.reopen()
        self._map_since = self._link.clock.now()
        if self._migrator is not None:
            self._migrator.follow(self._model.expert_weights)
        tables = None if self._tables is None else RoutingTables.even(expert_map, self._tables.width)
        self._route(range(expert_map.num_layers), expert_map, tables)
        self.stats.invalidations += 1

    def drain(self, timeout_s: float | None = None) -> None:
        """End the running cycle on all ranks and return when nothing is left of it: before an engine sleeps.

        Call it on every rank, between two passes. A commit that is agreed for a later step is executed now,
        by every rank. The next `step` may start a cycle again, unless paused. Arguments and errors as of
        `invalidate`.
        """
        run_blocking(self.draining(timeout_s))

    async def draining(self, timeout_s: float | None = None) -> None:
        """As `drain`."""
        await self._meet("drain", "", timeout_s)
        await self._await_end_of_cycle("drain")

    def resize(
        self,
        active_ranks: Iterable[int],
        *,
        dead: Iterable[int] | None = None,
        load_expert: LoadExpert | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Go on with other active ranks: ranks leave, drained or dead, and join. The tables keep their size.

        Call it on every rank that is active now or will be and lives, with the same arguments, between two
        passes. The running cycle ends; a commit that is agreed for a later step is executed. Experts that
        only ranks that leave have are moved to ranks that stay or join, the slots of ranks that join are
        filled, and all active ranks make the same passes from now on; the next `step` starts a cycle. On a
        rank that leaves, `is_active` is False when this returns; it may join again later.

        dead: ranks that are waited for by nobody. None: a rank that leaves and does not come within
            `timeout_s` is dead. A rank that died and was started anew joins, dead or not.
        load_expert: called with (layer, logical expert) for experts without a living replica, on the ranks
            that get them; returns the parameters as in `expert_weights`. By default the model's own
            `load_expert`, if it has one.
        timeout_s: how long to wait for the other ranks; the transfer time-out by default
        Raises ValueError for no ranks, ranks that do not exist or are given twice, a negative `timeout_s`, a
            closed balancer, and while another call runs: nothing has happened then. Raises
            `LostExpertsError`, which names them, for experts that no living rank has and nothing loads, and
            `ResizeError` when a rank does not come, means something else or fails: the active ranks are then
            what they were, on every rank, and it may be called again, with other ranks too. Raises
            `ForwardStopped` when this rank must not serve on.
        """
        run_blocking(self.resizing(active_ranks, dead=dead, load_expert=load_expert, timeout_s=timeout_s))

    async def resizing(
        self,
        active_ranks: Iterable[int],
        *,
        dead: Iterable[int] | None = None,
        load_expert: LoadExpert | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """As `resize`."""
        given, link = self._expert_map.topology, self._link
        if self._is_closed:
            raise ValueError("resize: this balancer is closed")
        limit = _limit(timeout_s, self._rules.timeout_s)
        active = Topology(given.num_ranks, given.num_nodes, active_ranks).active_ranks
        gone = None if dead is None else _dead_ranks(dead, active, given.num_ranks)
        if link.gate.failure is not None:
            raise ForwardStopped(f"resize: rank {link.rank}: an earlier commit is undecided: start it anew")
        load = load_expert or getattr(self._model, "load_expert", None)
        if not self._resize_lock.acquire(blocking=False):
            raise ValueError("resize: another call of `resize` runs: it is for the forward thread alone")
        self._wish_to_end = "resize was called"
        try:
            verdict = await self._hold_resize(active, gone, load is not None, limit)
            if link.rank in verdict.present:
                await self._take_part(verdict, load)
            else:
                await self._leave(verdict, self._expert_map)
        finally:
            self._wish_to_end = ""
            self._resize_lock.release()

    def close(self) -> None:
        """End the running cycle, stop the background thread and give back the group. Idempotent."""
        run_blocking(self.closing())

    async def closing(self) -> None:
        """As `close`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._link.gate.close()
        if not await self._background.close(self._rules.timeout_s):
            logger.warning("rank %d: the background thread is still in %s", self._link.rank, self.state)
        self._close_trace()
        self._accounts.add_profiling()
        if self._on_close is not None:
            self._on_close()

    # --- what can be seen ---

    @property
    def expert_map(self) -> ExpertMap:
        """The map that this rank routes by."""
        return self._expert_map

    @property
    def is_active(self) -> bool:
        """Whether this rank takes tokens."""
        return self._link.rank in self._link.members

    @property
    def state(self) -> str:
        """closed, inactive, paused, idle, or the stage of the running cycle."""
        if (stage := self._whereabouts.stage) is not None:
            return str(stage)
        if self._is_closed:
            return "closed"
        return "inactive" if not self.is_active else "paused" if self._is_paused else "idle"

    def snapshot(self) -> Mapping[str, object]:
        """This rank's state as plain data for JSON: `status` and the map in force."""
        return {**self.status(), "physical_to_logical": self._expert_map.physical_to_logical.tolist()}

    def status(self) -> Mapping[str, object]:
        """This rank's state in a few numbers, cheap enough to take every second from any thread.

        map_age_s: since the map in force was committed, or since the start; last_cycle_age_s: since a cycle
        ended, None before the first; step_running_s: since the forward thread entered the `step` that it is
        in, or stopped in; 0 outside. stage_running_s: since the running cycle entered its stage; waits_at,
        waits_for: where it has waited long, and the ranks that are missing there.
        """
        now = self._link.clock.now()
        return {
            "rank": self._link.rank,
            "state": self.state,
            "algorithm": self.config.algorithm,
            "map_age_s": now - self._map_since,
            "last_cycle_age_s": _since(self._accounts.last_end, now),
            "last_success_age_s": _since(self._accounts.last_success, now),
            "next_cycle_steps": self._steps_to_next_cycle(),
            **self._whereabouts.status(now),
            **self.stats.as_dict(),
        }

    @property
    def profiling(self) -> ComputeProfiling | None:
        """What measures compute time on this rank; None without `enable_expert_compute_profiling`."""
        return self._profiling

    def compute_statistics(self) -> dict[str, object]:
        """What experts cost over all ranks as of the last cycle: `get_statistics_summary` of the profiler.

        Raises RuntimeError without `enable_expert_compute_profiling`.
        """
        return self._measuring().merged_summary()

    def _measuring(self) -> ComputeProfiling:
        if self._profiling is None:
            raise RuntimeError(
                "no compute time is measured: eplb_config.enable_expert_compute_profiling is false"
            )
        return self._profiling

    def progress(self) -> Progress | None:
        """For the watchdog, from its thread. An engine that makes no passes keeps a cycle in its commit."""
        return self._whereabouts.progress(self._next_cycle - 1, is_closed=self._is_closed)

    def report_stall(self, line: str) -> None:
        """As `Watched.report_stall`."""
        self.stats.stalls += 1
        logger.warning("%s", line)

    # --- recording ---

    def record_start(self) -> None:
        """Record the map that serving starts from, on the rank that records: the file is there from now on.

        A record that cannot be written is reported, as in any cycle; a load trace likewise.
        """
        if not self._link.plans:
            return
        if self._recorder is not None:
            run_blocking(self._record_at("at the start", self._expert_map))
        if self._tracer is not None:
            self.stats.trace_steps = 0
            try:
                self._tracer.open()
            except RecordError as error:
                self._accounts.add_failed_record("at the start", "load trace", error)

    async def _record_at(self, when: str, expert_map: ExpertMap) -> None:
        assert self._recorder is not None
        objection = await self._fence.objection(self._meetings.plane) if self._resizes.generation else ""
        if objection:
            self._accounts.add_failed_record(when, "expert map", objection)
            return
        try:
            await self._recorder.record(expert_map, keep_earlier=False)
            self.stats.records_written += 1
        except RecordError as error:
            self._accounts.add_failed_record(when, "expert map", error)

    def _close_trace(self) -> None:
        if self._tracer is None or not self._link.plans:
            return
        try:
            self._tracer.close()
        except RecordError as error:
            self._accounts.add_failed_record("at the end", "load trace", error)

    # --- committing ---

    async def _pass_boundary(self) -> Action | None:
        clock = self._link.clock
        started = clock.now()
        try:
            return await self._link.gate.pass_boundary(clock, ANSWER_TIMEOUTS * self._rules.timeout_s)
        finally:
            wait = clock.now() - started
            self.stats.wait_s += wait
            self.stats.longest_wait_s = max(self.stats.longest_wait_s, wait)

    def _execute(self, action: Action) -> None:
        """A commit that fails here leaves this rank behind the others; anything else costs the cycle only."""
        fault: Exception | None = None
        if isinstance(action, Commit):
            self._commit(action)
        else:
            try:
                self._enqueue(action)
            except Exception as error:
                fault = error
        self._link.gate.acted(fault)

    def _enqueue(self, action: EnqueueExchange | OpenExchange) -> None:
        if isinstance(action, OpenExchange):
            self._link.group.open_exchange(action.epoch)
        else:
            self._link.group.enqueue(action.chunk)

    def _commit(self, commit: Commit) -> None:
        if self._migrator is None:
            raise RuntimeError("a commit was agreed for a balancer that only observes")
        chunk = commit.chunk
        self._migrator.swap(chunk)
        self._route(chunk.layers, chunk.map_after, commit.tables)
        self._map_since = self._link.clock.now()
        self.stats.commits += 1
        if self.stats.first_commit_step is None:
            self.stats.first_commit_step = self.stats.steps

    def _route(self, layers: Sequence[int], expert_map: ExpertMap, tables: RoutingTables | None) -> None:
        """Route `layers` by this map from now on, its replicas evenly or by the tables."""
        if tables is None:
            self._model.apply_map(layers, expert_map)
        else:
            chosen = list(layers)
            model = cast(WeightedModel, self._model)
            model.apply_tables(layers, expert_map, tables.logical_to_physical[chosen], tables.count[chosen])
        self._expert_map, self._tables = expert_map, tables
        if self._profiling is not None:
            self._profiling.follow(expert_map)

    # --- other active ranks ---

    async def _hold_resize(
        self, active: Sequence[int], dead: list[int] | None, can_load: bool, timeout_s: float
    ) -> Verdict:
        """A verdict that is also about this rank; one that was left out before joins."""
        rank = self._link.rank
        while True:
            before = self._link.members if self.is_active else ()
            presence = await self._presence(active, dead, can_load)
            verdict = await self._resizes.hold(presence, before, timeout_s)
            if verdict.includes(rank, presence.incarnation) or rank not in active:
                return verdict
            await self._leave(verdict, self._expert_map)

    async def _presence(self, active: Sequence[int], dead: list[int] | None, can_load: bool) -> Presence:
        link, in_force = self._link, self._expert_map
        topology = in_force.topology
        return Presence(
            await self._resizes.incarnation(),
            is_member=self.is_active,
            active_ranks=list(active),
            dead=dead,
            model=[
                *in_force.physical_to_logical.shape,
                in_force.num_logical_experts,
                topology.num_ranks,
                topology.num_nodes,
            ],
            can_load=can_load,
            epoch=max(link.epoch, link.wanted_epoch),
            boundary=link.gate.boundary,
            passes=self._heat.passes(),
            traced=0 if self._step_loads is None else self._step_loads.recorded,
            cycle=self._next_cycle,
        )

    async def _take_part(self, verdict: Verdict, load: LoadExpert | None) -> None:
        link, started = self._link, self._link.clock.now()
        if verdict.dead:
            link.break_group()  # what is pending with them never ends by itself
        with ExitStack() as until_moved:
            resizing = Resizing(
                link,
                self._meetings.plane,
                self._resizes.scope,
                verdict,
                RESIZE_TIMEOUTS * self._rules.timeout_s,
                model_map=self._expert_map,
                end_cycle=self._end_cycle_for_resize,
                make_staging=lambda: self._stage_for_resize(until_moved, load),
                swap=self._swap_for_resize,
            )
            try:
                target = await resizing.run()
            finally:
                self._resizes.forget_later(resizing.keys)
        if link.rank in verdict.active_ranks:
            await self._go_on(verdict, target)
            if not (resizing.has_group and verdict.present == verdict.active_ranks):
                link.break_group()  # the next cycle makes one of the active ranks
        else:
            await self._leave(verdict, target)
        if link.plans:
            logger.info(
                "resize: ranks %s are active; left: %s, gone: %s, joined: %s; %d experts moved, %d of them "
                "loaded, %.2f s",
                list(link.members), sorted({*verdict.members} - {*link.members}), verdict.dead,
                verdict.joining, resizing.moved, resizing.loaded, link.clock.now() - started,
            )  # fmt: skip

    async def _end_cycle_for_resize(self) -> ExpertMap:
        await self._await_end_of_cycle("resize")
        return self._expert_map

    def _stage_for_resize(self, until_moved: ExitStack, load: LoadExpert | None) -> int:
        migrator = self._migrator
        if migrator is None:
            if self._lend_migrator is None:
                raise RuntimeError("nothing here can move experts")
            migrator = self._migrator = until_moved.enter_context(self._lend_migrator())
            until_moved.callback(setattr, self, "_migrator", None)
        migrator.load_with(load)
        until_moved.callback(migrator.load_with, None)
        return migrator.staging.slots

    def _swap_for_resize(self, chunk: Chunk) -> None:
        assert self._migrator is not None
        self._migrator.swap(chunk)
        if self.is_active:
            self._route(chunk.layers, chunk.map_after, self._tables_with_even(chunk.layers, chunk.map_after))

    def _tables_with_even(self, layers: Sequence[int], expert_map: ExpertMap) -> RoutingTables | None:
        if self._tables is None:
            return None
        return self._tables.with_layers(layers, RoutingTables.even(expert_map, self._tables.width))

    async def _go_on(self, verdict: Verdict, target: ExpertMap) -> None:
        """The ranks of the verdict are active from now on, this one among them."""
        link, was_planning = self._link, self._link.plans and self.is_active
        await self._forget_generation(verdict)
        link.gate.start_anew(verdict.boundary)
        self._heat.skip_to(verdict.passes)
        if self._step_loads is not None:
            self._step_loads.skip_to(verdict.traced, target)
        layers = range(target.num_layers)
        self._route(layers, target, self._tables_with_even(layers, target))
        self._map_since = link.clock.now()
        self._next_cycle = verdict.cycle
        self._last_start = self.stats.steps
        self._is_requested = True
        self.stats.resizes += 1
        if link.plans and not was_planning:
            await self._take_over()
        if link.plans and self._recorder is not None and self._rules.moves_experts:
            await self._record_at("resize", self._expert_map)

    async def _take_over(self) -> None:
        """This rank plans and records from now on."""
        if isinstance(self._planner, AlgorithmPlanner) and self.config.observes:
            self._planner.warm_up()
        if self.config.trace_record_path is not None and self._tracer is None:
            logger.warning("the load trace ends: the rank that kept it is not active any more")

    async def _leave(self, verdict: Verdict, expert_map: ExpertMap) -> None:
        """This rank is not active any more."""
        self._link.break_group()
        await self._await_end_of_cycle("resize")
        await self._forget_generation(verdict)
        self._link.gate.start_anew(0)
        self._close_trace()
        self._expert_map = expert_map
        logger.info("rank %d is not active any more; active: %s", self._link.rank, verdict.active_ranks)

    async def _forget_generation(self, verdict: Verdict) -> None:
        link = self._link
        stale, link.finished_keys = link.finished_keys, ()
        link.members, link.generation = tuple(verdict.active_ranks), self._resizes.generation
        try:
            await self._meetings.plane.forget(stale)
            await self._meetings.start_anew()
        except Exception as error:  # what was agreed stands; keys stay behind in the store
            logger.warning("rank %d: resize: keys were not deleted: %s", link.rank, error)

    # --- cycles ---

    def _is_due(self) -> bool:
        if not self.config.observes or self._is_paused or self._is_closed or self._background.is_busy:
            return False
        interval = self.config.expert_heat_collection_interval
        return self._is_requested or self.stats.steps - self._last_start >= interval

    def _steps_to_next_cycle(self) -> int | None:
        if not self.config.observes or self._is_paused or self._is_closed or not self.is_active:
            return None
        made = self.stats.steps - self._last_start
        return 0 if self._is_requested else max(0, self.config.expert_heat_collection_interval - made)

    def _check_shape(self, expert_map: ExpertMap) -> None:
        in_force = self._expert_map
        if (
            expert_map.physical_to_logical.shape != in_force.physical_to_logical.shape
            or expert_map.num_logical_experts != in_force.num_logical_experts
            or expert_map.topology != in_force.topology
        ):
            raise ValueError(f"{expert_map!r} cannot replace {in_force!r}: they differ in shape or topology")

    async def _meet(self, purpose: str, content: str, timeout_s: float | None) -> None:
        """All forward threads are here when this returns, and agree on the number of the next cycle."""
        limit = _limit(timeout_s, self._rules.timeout_s)
        self._wish_to_end = f"{purpose} was called"
        try:
            self._next_cycle = await self._meetings.hold(purpose, content, self._next_cycle, limit)
        except BaseException:
            self._wish_to_end = ""
            raise
        self._last_start = self.stats.steps

    async def _await_end_of_cycle(self, purpose: str) -> None:
        """Ranks learn of an agreed commit one after the other; each that does executes it at once."""
        deadline = self._link.clock.now() + ANSWER_TIMEOUTS * self._rules.timeout_s
        while not await self._background.wait_idle(LOOK_AGAIN_S):
            action = self._link.gate.take_agreed_action()
            if action is not None:
                self._execute(action)
            if self._link.clock.now() > deadline:
                raise ForwardStopped(f"{purpose}: the background thread is still in {self.state}")
        self._wish_to_end = ""

    def _start_cycle(self) -> None:
        if self._migrator is not None:
            self._migrator.note_weights()
        self._is_requested = False
        self._last_start = self.stats.steps
        number, self._next_cycle = self._next_cycle, self._next_cycle + 1
        cycle = Cycle(
            number,
            self._link,
            self._rules,
            heat=self._heat,
            planner=self._planner,
            recorder=self._recorder,
            step_loads=self._step_loads,
            tracer=self._tracer,
            expert_map=self._expert_map,
            tables=self._tables,
            is_ending=self._why_end,
            on_stage=self._whereabouts.enter_stage,
            on_wait=self._whereabouts.wait_for,
            costs=self._profiling,
            cost_recorder=self._cost_recorder,
            record_objection=lambda: self._fence.objection(self._link.plane),
        )
        self._whereabouts.begin_cycle()
        self._background.start(self._run(cycle))

    async def _run(self, cycle: Cycle) -> None:
        try:
            self._accounts.add(await cycle.run(), self._last_start)
        finally:
            self._whereabouts.leave_cycle()

    def _why_end(self) -> str:
        return "closing" if self._is_closed else "paused" if self._is_paused else self._wish_to_end


def _limit(timeout_s: float | None, default_s: float) -> float:
    if timeout_s is None:
        return default_s
    if not timeout_s >= 0:  # NaN would wait for ever
        raise ValueError(f"timeout_s is {timeout_s:g}, expected a number of at least 0")
    return timeout_s


def _dead_ranks(dead: Iterable[int], active: Sequence[int], num_ranks: int) -> list[int]:
    ranks = sorted(set(dead))
    for rank in ranks:
        if rank in active or not 0 <= rank < num_ranks:
            why = "is to be active" if rank in active else f"is not one of {num_ranks} ranks"
            raise ValueError(f"dead rank {rank} {why}")
    return ranks


def _since(moment: float | None, now: float) -> float | None:
    return None if moment is None else now - moment
