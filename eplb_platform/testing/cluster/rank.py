"""One simulated rank: a real balancer over simulated ports, and the forward thread that calls it."""

from __future__ import annotations

import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.migration.staging import BYTES_PER_MB, Staging
from eplb_platform.migration.transfer import Migrator
from eplb_platform.runtime.agreement import Agreement
from eplb_platform.runtime.balancer import ANSWER_TIMEOUTS, Balancer
from eplb_platform.runtime.bounded_planner import BoundedPlanner
from eplb_platform.runtime.cycle import RankLink, Stage
from eplb_platform.runtime.deployment import Deployment, DeploymentError
from eplb_platform.runtime.gate import ForwardGate, ForwardStopped
from eplb_platform.runtime.meeting import ForwardMeetings, MeetingFailed
from eplb_platform.runtime.planning import AlgorithmPlanner
from eplb_platform.runtime.ports import ControlPlane, ExpertLoad
from eplb_platform.runtime.resize_meeting import ResizeError
from eplb_platform.runtime.resizing import LostExpertsError
from eplb_platform.runtime.start import PLANNER_TIMEOUTS, assemble
from eplb_platform.testing.cluster.engine import Engine, EngineFailed, Pass
from eplb_platform.testing.cluster.membership import TRIES, Membership, Wish
from eplb_platform.testing.cluster.network import Network, SimulatedGroup
from eplb_platform.testing.cluster.ports import (
    SimulatedBackground,
    SimulatedClock,
    SimulatedPlanner,
    SimulatedRecorder,
    SimulatedTracer,
)
from eplb_platform.testing.cluster.scheduler import Task
from eplb_platform.testing.cluster.store import SimulatedPlane, SimulatedStore, Weather
from eplb_platform.testing.cluster.weights import TagMemory

if TYPE_CHECKING:
    import torch

    from eplb_platform.backend import Backend

TABLE_WIDTH = 6
RESIZE_TIMEOUTS = 40.0
"""A call of `resize` ends within so many transfer time-outs."""
ROUNDING_S = 1e-6


class InjectedError(RuntimeError):
    """What a fault raises in a stage."""


class _PokingCondition(threading.Condition):
    """The gate's condition where waiting is the scheduler's business."""

    def __init__(self, poke: Callable[[], None]) -> None:
        super().__init__()
        self._poke = poke

    def notify_all(self) -> None:
        self._poke()


class _Passing(ControlPlane):
    """The forward thread's client of the store.

    at_place: awaited before and after each write, with the place in a resize that it is for
    """

    def __init__(self, plane: ControlPlane, at_place: Callable[[str], Awaitable[None]]) -> None:
        self._at_place = at_place
        self._plane = plane

    async def settle(self, key: str, value: str) -> str:
        _, is_resize, rest = f"/{key}".partition("/resize/")
        place = rest.split("/")[1] if is_resize and "/" in rest else ""
        place = "presence" if place.isdigit() else place
        await self._at_place(place)
        result = await self._plane.settle(key, value)
        await self._at_place(place)
        return result

    async def read(self, key: str) -> str | None:
        return await self._plane.read(key)

    async def read_all(self, keys: Sequence[str]) -> list[str]:
        return await self._plane.read_all(keys)

    async def count(self, key: str) -> int:
        return await self._plane.count(key)

    async def forget(self, keys: Sequence[str]) -> None:
        await self._plane.forget(keys)


class TaggedModel:
    """The engine's model on one rank, as the balancer gets it."""

    def __init__(self, engine: Engine, rank: int, expert_map: ExpertMap) -> None:
        self.expert_map = expert_map
        self.routing_table_width = max(TABLE_WIDTH, engine.scenario.num_redundant + 1)
        self.expert_weights: Sequence[Sequence[torch.Tensor]] = engine.weights.of_rank(rank)
        self._engine = engine
        self._rank = rank
        self.is_in_step = False

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None:
        if self.is_in_step and "logical_to_physical" not in vars(expert_map):
            self._engine.violate(f"rank {self._rank}: the forward thread must derive the tables of a map")
        self._engine.routes_by(self._rank, layers, expert_map)

    def apply_tables(
        self,
        layers: Sequence[int],
        expert_map: ExpertMap,
        logical_to_physical: NDArray[np.int32],
        count: NDArray[np.int32],
    ) -> None:
        """Each entry in use must be a slot that holds the expert; the shape never changes."""
        if logical_to_physical.shape[2] != self.routing_table_width:
            self._engine.violate(f"rank {self._rank}: a table of width {logical_to_physical.shape[2]}")
        held = expert_map.physical_to_logical[list(layers)]
        in_use = np.arange(logical_to_physical.shape[2]) < count[..., None]
        experts = np.arange(held.shape[0])[:, None, None], logical_to_physical
        right = held[experts] == np.arange(logical_to_physical.shape[1])[:, None]
        if (in_use & ~right).any() or (count < 1).any():
            self._engine.violate(
                f"wrong token: rank {self._rank}: a table's entry is no replica of its expert"
            )
        self._engine.routes_by(self._rank, layers, expert_map)


class SimulatedRank:
    """One process of the engine.

    expert_map: what its weights follow at the start
    deploy: where the weights are moved to before the first pass
    joins: whether it is a new process in an engine that serves already
    process: the number of this process among those that the rank has had
    """

    def __init__(
        self,
        rank: int,
        engine: Engine,
        store: SimulatedStore,
        network: Network,
        config: EplbConfig,
        expert_map: ExpertMap,
        deploy: ExpertMap | None,
        folder: Path | None,
        *,
        joins: bool = False,
        process: int = 0,
    ) -> None:
        self.rank = rank
        self.engine = engine
        self.config = config
        self.weather = Weather()
        self.observers: list[Callable[[Stage], None]] = []
        """Called when its cycle enters a stage; what they raise, the cycle sees."""
        self.calls: dict[int, list[Callable[[], Awaitable[None]]]] = {}
        """What the engine calls after a pass, by the number of the pass."""
        self.ending = ""
        """Why the forward thread ended; empty while it serves."""
        self.is_dead = False
        self.dies_at = ""
        """The place of a resize where it dies, and as what fault, and after how many passings."""
        self.death = ""
        self.places_before_death = 0
        self.longest_wait_s = 0.0
        self._commits_before_pause = 0
        self.slept_s = 0.0
        """For how long its clock went on while it could not."""
        self.refusals = 0
        """Calls of `resize` that failed one after the other."""
        self.tasks: list[Task] = []
        self._questions: list[Task] = []
        scenario, scheduler = engine.scenario, engine.scheduler
        draw = random.Random(f"rank {rank} of {scenario.seed}" + f", process {process}" * bool(process))
        members = [one for one in expert_map.topology.active_ranks if one != rank or not joins]
        self.clock = SimulatedClock(scheduler, store, timeout_s=config.transfer_timeout_s)
        gate = ForwardGate(_PokingCondition(self.clock.poke))
        self.model = TaggedModel(engine, rank, expert_map)
        self.memory = TagMemory(
            rank, self.model.expert_weights, network.memories, lambda: self._inject("transfer corrupted")
        )
        self.memory.verifies = config.verify_transfers
        network.memories[rank] = self.memory
        self._migrator = self._new_migrator() if config.moves_experts or deploy is not None else None
        self.group = SimulatedGroup(
            network,
            rank,
            self.memory,
            self._migrator,
            draw,
            ranks=members,
            timeout_s=config.transfer_timeout_s,
            is_device_group=scenario.device_group,
            on_call=lambda: self._check_thread("a group operation"),
            injected=self._inject,
            violate=engine.violate,
            step=lambda: engine.step,
            at_place=self._at_place,
        )
        self.background = SimulatedBackground(scheduler, rank, self.clock)
        self.link = RankLink(
            rank,
            scenario.num_ranks,
            plane=self._plane(store, draw),
            group=self.group,
            clock=self.clock,
            gate=gate,
            members=members,
        )
        self.recorder = SimulatedRecorder(
            None if folder is None else folder / "map.json",
            self._inject,
            self._check_record,
        )
        self.planner = SimulatedPlanner(
            scheduler,
            draw,
            timeout_s=config.transfer_timeout_s,
            check=self._check_load,
            injected=self._inject,
            algorithm=self._algorithm() if scenario.real_planner else None,
            answers=scenario.planned_maps,
            violate=engine.violate,
        )
        traces = config.trace_record_path is not None and self.link.plans
        self.tracer = SimulatedTracer(engine) if traces else None
        forward = self._plane(store, draw)
        self._meetings = ForwardMeetings(_Passing(forward, self._at_place), self.link)
        self._deploy = deploy
        self._is_in_step = False
        self._held_back: tuple[NDArray[np.int64] | None, ExpertMap, Phase, bool] | None = None
        self._physical: tuple[ExpertMap, NDArray[np.int64]] | None = None
        self.balancer = self._assemble(expert_map)

    # --- the forward thread ---

    async def serve(self) -> None:
        """Serve until the engine ends, or this rank must stop."""
        engine = self.engine
        try:
            if self.balancer.is_active:
                await self._start()
            else:
                self.balancer.record_start()
                await self._join()
            while self.balancer.is_active and not engine.is_over_after(engine.step):
                await self._serve_once()
            self.ending = "served to the end"
        except DeploymentError as refused:
            self.ending = f"refused: {refused}"
            engine.leave(self.rank, self.ending)
        except EngineFailed as failed:
            self.ending = str(failed)
        except ForwardStopped as stopped:
            self.ending = f"stopped: {stopped}"
            engine.leave(self.rank, self.ending)
            if not self.weather.has_lost:
                engine.violate(f"rank {self.rank} {self.ending}, though it could reach the store")
        finally:
            if engine.membership is not None and engine.is_over_after(engine.step):
                engine.membership.end()
        await self.close()

    async def _serve_once(self) -> None:
        """One pass, and what the engine calls after it."""
        engine, membership = self.engine, self.engine.membership
        served = await engine.forward(self.rank)
        calls = self.calls.pop(engine.step, ())
        if served is not None:
            await self._step(served)
            for call in calls:
                await call()
        if membership is None:
            return
        wish = membership.last_wish if served is None else served.wish
        if wish is not None:
            await self._resize(membership, wish)
            await self._join()

    async def _join(self) -> None:
        """Not active: wait until this rank is to join; returns when it has, or the engine ends."""
        membership = self.engine.membership
        assert membership is not None
        while not self.balancer.is_active:
            wish = await membership.call_for(self.rank)
            if wish is None:
                return
            await self._resize(membership, wish)

    async def _at_place(self, place: str) -> None:
        """Where a resize gets, on the forward thread; there it may die."""
        if place != self.dies_at or not self.death or self.engine.scheduler.current not in self.tasks:
            return
        if self.places_before_death:
            self.places_before_death -= 1
            return
        death, self.death = self.death, ""
        self._inject(death)
        self.engine.scheduler.call_at(self.engine.scheduler.now, self.die)
        await self.engine.scheduler.park(None)

    async def _resize(self, membership: Membership, wish: Wish) -> None:
        engine = self.engine
        started, slept = self.clock.now(), self.slept_s
        membership.calling.add(self.rank)
        deaths = membership.deaths
        load = engine.load_expert if membership.loads_experts else None
        try:
            await self.balancer.resizing(wish.active, dead=wish.dead, load_expert=load)
        except ResizeError as refused:
            engine.trace.add(engine.scheduler.now, f"rank {self.rank}: {refused}")
            if isinstance(refused, LostExpertsError):
                engine.names_experts(refused, is_exact=deaths == membership.deaths)
            engine.follows(self.rank, self.balancer.expert_map)
            membership.refused(self.rank, self.balancer._resizes.generation, wish, refused.gone)
            self.refusals += 1
            if self.refusals > TRIES:
                engine.cannot_resize(str(refused))
            await engine.scheduler.sleep(engine.scenario.step_s * engine.random.random())
        else:
            self.refusals = 0
            balancer, link = self.balancer, self.link
            passes = balancer._heat.passes()
            engine.resized(self.rank, link.generation, link.members, passes, balancer.expert_map)
        took = self.clock.now() - started - (self.slept_s - slept)
        if took > RESIZE_TIMEOUTS * self.config.transfer_timeout_s:
            engine.violate(f"rank {self.rank}: a resize took {took:.3f} s")

    async def _start(self) -> None:
        """What `start_balancer` does once the ports are there."""
        places = Agreement(
            self.link.plane,
            self.clock,
            scope="start",
            rank=self.rank,
            ranks=self.link.members,
        )
        deployment = Deployment(
            self.model,
            self.config,
            places,
            self.rank,
            layers_per_chunk=self.config.layer_updates_per_step,
            timeout_s=self.config.transfer_timeout_s,
            make_migrator=self._the_migrator,
            make_group=lambda migrator: self.group,
        )
        expert_map = await deployment.run(self.model.expert_map, self._deploy)
        self.link.finished_keys = places.keys
        self.balancer = self._assemble(expert_map)
        self.balancer.record_start()
        self.engine.has_started(self.rank, expert_map)

    async def close(self) -> None:
        """The engine ends on this rank."""
        started, slept = self.clock.now(), self.slept_s
        await self.balancer.closing()
        took = self.clock.now() - started - (self.slept_s - slept)
        if took > 1.4 * self.config.transfer_timeout_s:
            self.engine.violate(f"rank {self.rank}: closing took {took:.3f} s")

    async def _step(self, served: Pass) -> None:
        """What the engine does between two passes, and whether the balancer says where the time went."""
        stats = self.balancer.stats
        started, waited, commits, slept = self.clock.now(), stats.wait_s, stats.commits, self.slept_s
        load, counted_by, phase, is_dummy = self._counts(served)
        self._is_in_step = self.model.is_in_step = True
        try:
            await self.balancer.stepping(load, phase=phase, is_dummy=is_dummy, counted_by=counted_by)
        finally:
            self._is_in_step = self.model.is_in_step = False
            took, waited = self.clock.now() - started, stats.wait_s - waited
            slept = self.slept_s - slept
            self.longest_wait_s = max(self.longest_wait_s, took - slept)
            if took > waited + ROUNDING_S:
                self.engine.violate(
                    f"rank {self.rank}: a stall of {took:g} s, {waited:g} s are accounted for"
                )
            if took - slept > 1.4 * ANSWER_TIMEOUTS * self.config.transfer_timeout_s:
                self.engine.violate(f"rank {self.rank}: the forward thread waited for {took:.3f} s")
        if stats.commits != commits:
            self.engine.committed(self.rank, self.balancer.expert_map)
        self._check_pause()

    def _counts(self, served: Pass) -> tuple[NDArray[np.int64] | None, ExpertMap, Phase, bool]:
        """What the device counted: of this pass, or where counts come late of the one before."""
        expert_map, is_dummy = self.balancer.expert_map, bool(served.is_dummy[self.rank])
        tokens = int(served.tokens[self.rank])
        load = None if tokens == 0 and not is_dummy else self._physical_load(expert_map) * max(1, tokens)
        counts = load, expert_map, served.phase, is_dummy
        if not self.engine.scenario.counts_late:
            return counts
        counts, self._held_back = self._held_back or (None, expert_map, served.phase, False), counts
        return counts

    def _physical_load(self, expert_map: ExpertMap) -> NDArray[np.int64]:
        """[layers, physical], all tokens on each expert's first replica."""
        if self._physical is None or self._physical[0] is not expert_map:
            load = np.zeros(expert_map.physical_to_logical.shape, dtype=np.int64)
            first = expert_map.logical_to_physical[:, :, 0]
            np.put_along_axis(load, first.astype(np.int64), self.engine.basic_load, axis=1)
            self._physical = expert_map, load
        return self._physical[1]

    async def meet(self, call: Callable[[], Awaitable[None]], *, may_fail: bool) -> None:
        """A call that all forward threads make; it ends in time, and fails only where it may."""
        started, slept = self.clock.now(), self.slept_s
        commits = self.balancer.stats.commits
        try:
            await call()
        except MeetingFailed as failed:
            self.engine.trace.add(self.engine.scheduler.now, f"rank {self.rank}: {failed}")
            if not may_fail:
                self.engine.violate(f"rank {self.rank}: {failed}")
        took = self.clock.now() - started - (self.slept_s - slept)
        if took > 5 * self.config.transfer_timeout_s:
            self.engine.violate(f"rank {self.rank}: a meeting took {took:.3f} s")
        if self.balancer.stats.commits != commits:
            self.engine.committed(self.rank, self.balancer.expert_map)

    # --- what goes wrong ---

    def freeze(self, seconds: float) -> None:
        """As SIGSTOP and, after `seconds`, SIGCONT."""
        self.slept_s += seconds
        self.engine.scheduler.freeze(self.rank, seconds)

    def jump(self, seconds: float) -> None:
        """The clock goes forward at once."""
        self.slept_s += seconds
        self.clock.jump(seconds)
        self.clock.poke()

    def die(self) -> None:
        """As kill -9."""
        if self.is_dead or self.ending:
            return
        self.is_dead, self.ending = True, "dead"
        self.background.kill()
        for task in [*self.tasks, *self._questions]:
            if task is not self.engine.scheduler.current:
                self.engine.scheduler.kill(task)
        self.engine.leave(self.rank, "killed")

    # --- checks ---

    def _enter(self, stage: Stage) -> None:
        for observer in list(self.observers):
            observer(stage)

    def _check_load(self, load: ExpertLoad) -> None:
        """What is planned on is what was served, counted by the map that it was served by."""
        scenario, engine = self.engine.scenario, self.engine
        if not engine.counts_all:
            if not engine.is_served(load):
                engine.violate("the load that is planned on was never served")
            return
        steps = scenario.config.expert_heat_collection_interval
        per_window = -(-steps // scenario.config.num_load_windows)
        completed = engine.step // per_window
        for end in range(completed, max(-1, completed - 2 * scenario.config.num_load_windows - 40), -1):
            first = end - len(load)
            tokens = [
                engine.window_tokens(number * per_window, (number + 1) * per_window)
                for number in range(max(first, 0), end)
            ]
            truth = np.array(tokens)[:, None, None] * engine.basic_load
            if truth.shape == load.shape and (truth == load).all():
                return
        engine.violate("the load that is planned on is not what was served")

    def _check_record(self, expert_map: ExpertMap) -> None:
        """What is recorded where experts move is what this rank routes by, at that moment."""
        self.engine.recorded(self.rank, self.link.generation)
        if self.config.moves_experts and expert_map.digest() != self.balancer.expert_map.digest():
            self.engine.violate(f"rank {self.rank}: records another map than the one in force")

    def note_pause(self) -> None:
        """`pause` is called: a commit that is agreed may still come, and no other."""
        self._commits_before_pause = self.balancer.stats.commits

    def _check_pause(self) -> None:
        if self.balancer._is_paused:
            after = self.balancer.stats.commits - self._commits_before_pause
            if after > 1:
                self.engine.violate(f"rank {self.rank}: {after} commits since `pause`, expected at most one")

    def _check_thread(self, what: str) -> None:
        """While the engine waits for `step`, its thread calls nobody."""
        if self._is_in_step and self.engine.scheduler.current in self.tasks:
            self.engine.violate(f"rank {self.rank}: {what} on the forward path")

    def _inject(self, kind: str) -> None:
        self.engine.inject(kind, self.rank)

    # --- its parts ---

    def _plane(self, store: SimulatedStore, draw: random.Random) -> SimulatedPlane:
        return SimulatedPlane(
            store,
            self.engine.scheduler,
            self.weather,
            draw,
            timeout_s=self.config.transfer_timeout_s / 2,
            on_request=lambda: self._check_thread("a request to the store"),
        )

    def _assemble(self, expert_map: ExpertMap) -> Balancer:
        return assemble(
            self.config,
            self.model,
            self.link,
            self._meetings,
            model_name="simulated",
            expert_map=expert_map,
            migrator=self._migrator if self.config.moves_experts else None,
            planner=BoundedPlanner(
                self.planner,
                self.clock,
                self.link.gate,
                timeout_s=PLANNER_TIMEOUTS * self.config.transfer_timeout_s,
                run=self._ask_planner,
            ),
            recorder=self.recorder if self.config.records_map else None,
            tracer=self.tracer,
            background=self.background,
            lend_migrator=lambda: self.group.lent(self._new_migrator()),
            on_stage=self._enter,
        )

    def _ask_planner(self, question: Coroutine[None, None, None]) -> None:
        self._questions.append(self.engine.scheduler.spawn(self.rank, "planner", question))

    def _algorithm(self) -> AlgorithmPlanner:
        return AlgorithmPlanner(
            self.config.algorithm,
            1,
            self.config.transfer_timeout_s,
            min_balancedness=self.config.min_balancedness,
            survive=self.config.survive,
        )

    def _the_migrator(self) -> Migrator:
        assert self._migrator is not None
        return self._migrator

    def _new_migrator(self) -> Migrator:
        config, backend = self.config, cast("Backend", self.memory)
        max_bytes = None
        if config.staging_memory_mb is not None:
            max_bytes = round(config.staging_memory_mb * BYTES_PER_MB)
        staging = Staging(
            backend,
            self.model.expert_weights,
            max_bytes=max_bytes,
            layers_per_chunk=config.layer_updates_per_step,
        )
        if max_bytes is not None and staging.nbytes > max_bytes:
            self.engine.violate(
                f"rank {self.rank}: a staging of {staging.nbytes} bytes, expected {max_bytes}"
            )
        return Migrator(
            backend, self.model.expert_weights, staging, self.rank, verify=config.verify_transfers
        )
