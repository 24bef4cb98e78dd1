"""One seed from start to end: what is served, what goes wrong meanwhile, and whether every rule held."""

from __future__ import annotations

import logging
import random
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime.cycle import Stage
from eplb_platform.testing.cluster.computed_once import computed_once
from eplb_platform.testing.cluster.engine import Engine, Trace
from eplb_platform.testing.cluster.membership import Membership
from eplb_platform.testing.cluster.network import Network
from eplb_platform.testing.cluster.rank import InjectedError, SimulatedRank
from eplb_platform.testing.cluster.scenario import (
    ENGINE_FAULTS,
    MEETINGS,
    RANK_FAULTS,
    RESIZE_DEATHS,
    RESIZES,
    STEP_S,
    TIMEOUT_S,
    FaultPlan,
    Scenario,
    draw_scenario,
)
from eplb_platform.testing.cluster.scheduler import Scheduler, Stuck
from eplb_platform.testing.cluster.store import SimulatedStore
from eplb_platform.testing.cluster.strikes import RESIZE_STRIKES, STRIKES
from eplb_platform.topology import Topology

RECOVERY_CYCLES = 4
"""So many collections, and the time-outs of so many cycles, are enough to be well again."""
MEETING_FAULTS = ("lost messages", "store gone", "slow", "rank frozen", "clock jump", "rank dead")
HARMLESS = {
    "idle engine",
    "rebalance now",
    "rebalance now on one rank",
    "pause",
    "pause on one rank",
    "slow rank",
}
SLOWING = {"rank dead", *RESIZE_DEATHS, *(kind for kind in RESIZES if "dead" in kind)} | {
    kind
    for kind in (*RANK_FAULTS, *ENGINE_FAULTS)
    if kind.startswith(("slow", "lost", "store", "rank frozen", "clock"))
}
CALM_WAIT_STEPS = 3.0


@dataclass
class Result:
    """What one seed came to."""

    seed: int
    violations: list[str]
    injected: Counter[str]
    """Faults that took effect, by kind."""
    passes: int = 0
    commits: int = 0
    cycles: Counter[str] = field(default_factory=Counter)
    """By outcome, over all ranks."""
    recovered: bool | None = None
    """Whether a cycle succeeded after the last fault; None where none came, or nothing had to be well."""
    longest_wait_steps: float = 0.0
    events: int = 0
    resizes: Counter[str] = field(default_factory=Counter)
    """What came of calls of `resize`, over all ranks."""
    maps_in_force: frozenset[str] = frozenset()
    """Digests of all maps that ranks were to route by."""
    trace: list[str] = field(default_factory=list)

    @property
    def replay(self) -> str:
        """The command that runs this seed again and shows what happened."""
        return f"python -m eplb_platform.testing.cluster --seed {self.seed} --trace"


def simulate(scenario: Scenario | int, *, keep_trace: bool = False) -> Result:
    """Run a scenario, or the one that a seed stands for. Equal scenarios give equal results."""
    if isinstance(scenario, int):
        scenario = draw_scenario(scenario)
    with ExitStack() as stack:
        folder = None
        if scenario.keeps_files:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eplb-cluster-")))
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        stack.enter_context(computed_once())
        return Simulation(scenario, folder, keep_trace).run()


class Simulation:
    """The parts of one run, and what its end is judged by."""

    def __init__(self, scenario: Scenario, folder: Path | None, keep_trace: bool) -> None:
        self.scenario = scenario
        self.random = random.Random(f"faults {scenario.seed}")
        self.scheduler = Scheduler(scenario.seed, limit_s=3600)
        self.initial = scenario.initial_map or ExpertMap.initial(
            scenario.num_layers, scenario.num_logical, scenario.topology, scenario.num_redundant
        )
        self.engine = Engine(scenario, self.scheduler, Trace(keep_trace), self.initial)
        self.store = SimulatedStore(self.scheduler)
        self.network = Network(self.scheduler)
        self.folder = folder
        deploy = _shuffled(self.initial, self.random) if scenario.deploys else None
        other = _shuffled(self.initial, self.random) if scenario.odd_deploys else None
        self.ranks = [
            SimulatedRank(
                rank,
                self.engine,
                self.store,
                self.network,
                self._config_of(rank),
                self.initial,
                other if other and rank == scenario.odd_rank else deploy,
                folder,
            )
            for rank in range(scenario.num_ranks)
        ]
        self.former: list[SimulatedRank] = []
        """Processes in whose place there are others."""
        if self.engine.membership is not None:
            self.engine.membership.restart = self.restart_soon
            self.engine.membership.loads_experts = self.random.random() < 0.6
        self._is_between_passes = False
        """Whether a fault comes where some ranks may have ended the pass already."""
        self.is_permanent = False
        """Whether something came after which no cycle has to succeed."""
        self.recovered: bool | None = None
        self.well_since: dict[SimulatedRank, int] = {}
        """When each rank has to be well again, in cycles that succeed there."""
        self._serving = scenario.num_ranks

    def _config_of(self, rank: int) -> EplbConfig:
        scenario = self.scenario
        if rank != scenario.odd_rank or not scenario.different_config:
            return scenario.config
        return EplbConfig(**{**scenario.config.model_dump(), **scenario.different_config})

    def run(self) -> Result:
        engine, scheduler = self.engine, self.scheduler
        engine.trace.add(0.0, f"{self.scenario}")
        for rank in self.ranks:
            rank.tasks.append(scheduler.spawn(rank.rank, "forward", self._serve(rank)))
        engine.on_pass = self._after_pass
        try:
            scheduler.run()
        except Stuck as stuck:
            where = Counter(f"{rank.balancer.state}, {rank.ending or 'serving'}" for rank in self.ranks)
            engine.violate(f"{stuck}: {dict(where)}")
        if not engine.violations:
            self._judge()
        return self._result()

    async def _serve(self, rank: SimulatedRank) -> None:
        try:
            await rank.serve()
        finally:
            self._serving -= 1
            if not self._serving:
                self.scheduler.stop()

    # --- processes ---

    @property
    def processes(self) -> list[SimulatedRank]:
        """All that there were."""
        return [*self.former, *self.ranks]

    @property
    def membership(self) -> Membership:
        assert self.engine.membership is not None
        return self.engine.membership

    @property
    def planning_rank(self) -> SimulatedRank:
        return self.ranks[min(self.engine.members)]

    def restart_soon(self, rank: int) -> None:
        """A new process of `rank`, unless there is one by then."""
        self.later(lambda: self.restart(rank) if self.ranks[rank].ending else None, 10)

    def restart(self, rank: int) -> None:
        """A new process of `rank`, which has no weights yet and is not active."""
        engine, membership, given = self.engine, self.engine.membership, self.initial.topology
        assert membership is not None
        others = sorted(membership.serving - {rank})
        if membership.is_ended or not others:
            return
        topology = Topology(given.num_ranks, given.num_nodes, others)
        self.former.append(self.ranks[rank])
        new = self.ranks[rank] = SimulatedRank(
            rank,
            engine,
            self.store,
            self.network,
            self._config_of(rank),
            _any_map(self.initial, topology),
            None,
            self.folder,
            joins=True,
            process=len(self.former),
        )
        engine.trace.add(self.scheduler.now, f"rank {rank}: a new process")
        self._serving += 1
        new.tasks.append(self.scheduler.spawn(rank, "forward", self._serve(new)))

    # --- faults ---

    def _after_pass(self, step: int) -> None:
        """Pass `step` has begun: faults that come now come while it runs."""
        scenario = self.scenario
        for fault in scenario.faults:
            if fault.step == step:
                if fault.stage is None:
                    self._strike(fault)
                else:
                    self._lie_in_wait(fault)
        if step >= scenario.quiet_step and self.engine.last_pass is None:
            self._look_for_recovery(step)

    def _lie_in_wait(self, fault: FaultPlan) -> None:
        everywhere = fault.kind == "exception in a stage of all ranks"
        for rank in self.ranks if everywhere else [self.ranks[fault.rank]]:
            self._lie_in_wait_on(rank, fault)

    def _lie_in_wait_on(self, rank: SimulatedRank, fault: FaultPlan) -> None:
        def observe(stage: Stage) -> None:
            if stage == fault.stage and self.engine.step < self.scenario.quiet_step:
                rank.observers.remove(observe)
                self._strike(fault)
                if rank.is_dead:
                    raise InjectedError("dead")
                if fault.kind.startswith("exception"):
                    raise InjectedError(f"injected into {stage}")

        rank.observers.append(observe)

    def _strike(self, fault: FaultPlan) -> None:
        self.engine.trace.add(self.scheduler.now, f"comes: {fault}")
        self._is_between_passes = fault.stage is not None
        if fault.kind in RESIZE_STRIKES:
            RESIZE_STRIKES[fault.kind](self, self.ranks[fault.rank], fault.kind)
            return
        if fault.kind not in ("transfer corrupted", "plan differs on a rank") and not fault.kind.startswith(
            ("planner", "error", "fetch", "full", "read-only")
        ):
            self.engine.inject(fault.kind, fault.rank)
        STRIKES[fault.kind](self, self.ranks[fault.rank])

    def meet(self, kind: str, odd: SimulatedRank) -> None:
        """All active ranks are called together after the pass that runs: to load weights anew, or drain.

        odd: a rank that comes late, or for something else, where `kind` says so
        """
        draw, scenario, called = self.random, self.scenario, sorted(self.engine.members)
        odd = odd if odd.rank in called else self.ranks[draw.choice(called)]
        purpose = kind if kind in ("invalidate", "drain") else draw.choice(("invalidate", "drain"))
        kinds = [fault.kind for fault in scenario.faults]
        may_fail = (
            purpose != kind
            or scenario.resizes
            or any(one.startswith(MEETING_FAULTS) for one in kinds)
            or sum(one in MEETINGS for one in kinds) > 1
        )
        in_force = self.ranks[called[0]].balancer.expert_map
        loaded = _shuffled(in_force, draw)
        for rank in (self.ranks[one] for one in called):
            is_odd = rank is odd
            mine = (
                ("drain" if purpose == "invalidate" else "invalidate")
                if is_odd and kind == "ranks mean different meetings"
                else purpose
            )
            step = self.engine.step + self._is_between_passes + (is_odd and kind == "a rank misses a meeting")
            call = self._invalidating(rank, loaded) if mine == "invalidate" else rank.balancer.draining
            rank.calls.setdefault(step, []).append(partial(rank.meet, call, may_fail=may_fail))

    def _invalidating(self, rank: SimulatedRank, loaded: ExpertMap) -> Callable[[], Awaitable[None]]:
        version = self.engine.weights.version + 1

        async def load_anew() -> None:
            if loaded.topology != rank.balancer.expert_map.topology:
                return  # a late call, which other active ranks have made void
            await rank.balancer.invalidating(loaded)
            self.engine.load_anew(rank.rank, loaded, version)

        return load_anew

    def later(self, action: Callable[[], None], most_steps: float = 8) -> None:
        """What has come goes again."""
        seconds = STEP_S * self.random.uniform(0.5, most_steps)
        self.scheduler.call_at(self.scheduler.now + seconds, action)

    # --- the end ---

    def _look_for_recovery(self, step: int) -> None:
        """From the quiet step on, a cycle must succeed in due time."""
        scenario, engine = self.scenario, self.engine
        someone_left = engine.membership is None and len(engine.members) < scenario.num_ranks
        if not scenario.config.observes or self.is_permanent or engine.failure or someone_left:
            engine.last_pass = step + 3
            return
        cycles = {self.ranks[rank]: self.ranks[rank].balancer.stats.cycles for rank in engine.members}
        if not self.well_since:
            self.well_since = dict.fromkeys(cycles, max(cycles.values()) + 1)
            return
        for rank, number in cycles.items():
            self.well_since.setdefault(rank, number + 1)
        if all(number > self.well_since[rank] for rank, number in cycles.items()):
            self.recovered = True
            engine.last_pass = step + self.random.randint(1, 6)
            return
        interval = scenario.config.expert_heat_collection_interval
        patience = RECOVERY_CYCLES * (interval + 4 * TIMEOUT_S / STEP_S) + 60 * scenario.num_layers
        if step > scenario.quiet_step + patience:
            self.recovered = False
            engine.last_pass = step + 1

    def _judge(self) -> None:
        """What must hold when all has ended."""
        engine, scenario = self.engine, self.scenario
        if self.recovered is False:
            last = Counter(rank.balancer.stats.last_error for rank in self.processes)
            states = Counter(rank.balancer.state for rank in self.ranks)
            engine.violate(f"no cycle succeeds any more: {dict(states)}, {dict(last)}")
        for rank in self.processes:
            if rank.is_dead:
                continue
            for task in rank.tasks:
                if task.error is not None:
                    engine.violate(f"rank {rank.rank}: the forward thread raises {task.error!r}")
            if rank.background.task is not None and rank.background.task.error is not None:
                engine.violate(f"rank {rank.rank}: a cycle raises {rank.background.task.error!r}")
        if scenario.config.moves_experts:
            for rank in self.processes:
                self._judge_record(rank)
        if not scenario.config.moves_experts and engine.commits.any():
            engine.violate("experts moved though the configuration only observes")
        if (scenario.different_config or scenario.odd_deploys) and engine.started:
            engine.violate("ranks serve though their configurations differ, or the maps that they deploy")
        if not scenario.config.observes and any(key.startswith("cycle") for key in self.store.values):
            engine.violate("ranks speak to each other though nothing is observed")
        self._judge_keys()
        self._judge_calm()

    def _judge_record(self, rank: SimulatedRank) -> None:
        recorder, recorded = rank.recorder, rank.recorder.recorded
        if recorded is None or not rank.balancer.is_active:
            return  # a rank that was taken for dead may end a cycle that the others have left
        if recorder.path is not None and not rank.is_dead and self.engine.membership is None:
            read = ExpertMap.load(recorder.path)
            recorded = ExpertMap(read.physical_to_logical, read.num_logical_experts, recorded.topology)
        if recorded.digest() not in self.engine.maps_in_force:
            self.engine.violate(f"rank {rank.rank}: the recorded map was never in force")
        is_last_word = rank.link.plans and rank.ending == "served to the end"
        if not is_last_word or self.scenario.resizes or any(map(_spoils_records, self.engine.injected)):
            return
        if recorded.digest() != rank.balancer.expert_map.digest():
            self.engine.violate(f"rank {rank.rank}: the map in force at the end is not the recorded one")

    def _judge_calm(self) -> None:
        """Where nothing is in the way, no cycle fails and no forward thread waits long."""
        ranks, faults = self.processes, set(self.engine.injected)
        failed = sum(rank.balancer.stats.failed_cycles for rank in ranks)
        if failed and faults <= HARMLESS and not self.scenario.different_config:
            errors = sorted({rank.balancer.stats.last_error for rank in ranks} - {""})
            self.engine.violate(f"cycles fail without a reason: {errors}")
        numbers = {int(key.split("/")[1]) for key in self.store.values if key.startswith("cycle/")}
        if faults <= HARMLESS and numbers and min(numbers) < max(numbers) - 2:
            self.engine.violate(f"the store keeps keys of cycle {min(numbers)} in cycle {max(numbers)}")
        longest = max(rank.longest_wait_s for rank in ranks) / self.scenario.step_s
        if longest > CALM_WAIT_STEPS and not faults & SLOWING:
            self.engine.violate(
                f"a forward thread waits {longest:.1f} steps though every message comes in time"
            )

    def _judge_keys(self) -> None:
        """Two cycles' keys may be there at a time, and two meetings'."""
        scenario = self.scenario
        chunks = scenario.num_layers * 6 + 2
        most = 3 * (8 + 3 * chunks) * (scenario.num_ranks + 2)
        if self.store.most_keys > most:
            self.engine.violate(f"{self.store.most_keys} keys in the store, expected at most {most}")

    def _result(self) -> Result:
        engine, ranks = self.engine, self.processes
        cycles: Counter[str] = Counter()
        for rank in ranks:
            stats = rank.balancer.stats
            for outcome in ("moved", "stayed", "no_load", "failed", "cancelled"):
                cycles[outcome] += getattr(stats, f"{outcome}_cycles")
        return Result(
            seed=self.scenario.seed,
            violations=engine.violations,
            injected=engine.injected,
            passes=engine.step,
            commits=int(engine.commits.max(initial=0)),
            cycles=cycles,
            recovered=self.recovered if engine.injected else None,
            longest_wait_steps=max(rank.longest_wait_s for rank in ranks) / self.scenario.step_s,
            events=self.scheduler.events,
            resizes=Counter() if engine.membership is None else engine.membership.counts,
            maps_in_force=frozenset(engine.maps_in_force),
            trace=engine.trace.lines,
        )


def _spoils_records(kind: str) -> bool:
    """Whether the map may be recorded late after this fault, or not at all."""
    return kind in (*MEETINGS, "full disk", "read-only folder") or kind.startswith(("exception", "rank dead"))


def _shuffled(expert_map: ExpertMap, draw: random.Random) -> ExpertMap:
    """The same experts in other slots of the active ranks."""
    table = expert_map.physical_to_logical.copy()
    in_use = np.flatnonzero(table[0] >= 0).tolist()
    table[:, in_use] = table[:, draw.sample(in_use, k=len(in_use))]
    return ExpertMap(table, expert_map.num_logical_experts, expert_map.topology)


def _any_map(like: ExpertMap, topology: Topology) -> ExpertMap:
    """A map of the same shape on the active ranks of `topology`; `like` where they have too few slots."""
    slots = like.slots_per_rank
    if slots * topology.num_active_ranks < like.num_logical_experts:
        return like
    table = np.full(like.physical_to_logical.shape, -1, dtype=np.int32)
    places = [rank * slots + slot for rank in topology.active_ranks for slot in range(slots)]
    table[:, places] = np.arange(len(places)) % like.num_logical_experts
    return ExpertMap(table, like.num_logical_experts, topology)
