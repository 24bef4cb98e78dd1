"""What a seed stands for: a cluster, a configuration, and the faults that come over it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime.cycle import Stage
from eplb_platform.topology import Topology

STEP_S = 0.02
TIMEOUT_S = 0.4
"""The time-out of transfers and agreements: some twenty steps."""

ANY_STAGE = (
    Stage.START, Stage.COLLECT, Stage.PLAN, Stage.BROADCAST, Stage.COMPARE, Stage.SCHEDULE, Stage.FETCH,
    Stage.AGREE, Stage.COMMIT, Stage.COMMIT, Stage.COMMIT, Stage.RECORD,
)  # fmt: skip

PLANNER_FAULTS = ("planner exception", "planner time-out", "planner late", "planner nonsense")
RANK_FAULTS = (
    "slow rank", "slow background", "slow control plane", "lost messages", "store gone", "rank frozen",
    "clock jump", "plan differs on a rank", "transfer corrupted", "fetch never finishes", "error in fetch",
    "error in sum", "error in broadcast", "error in rebuild", "exception in a stage",
)  # fmt: skip
ENGINE_FAULTS = (
    "store gone for all", "lost messages everywhere", "slow control plane everywhere", "idle engine",
    "full disk", "read-only folder", "pause", "pause on one rank", "rebalance now",
    "rebalance now on one rank", "invalidate", "drain", "a rank misses a meeting",
    "ranks mean different meetings", "exception in a stage of all ranks",
)  # fmt: skip
RESIZES = (
    "ranks leave", "ranks join", "ranks leave while others join", "rank taken for dead",
    "rank dead, others go on", "rank dead, a new process comes",
)  # fmt: skip
RESIZE_DEATHS = {
    "rank dies coming to a resize": "presence",
    "rank dies once a resize is agreed": "ended",
    "rank dies in the transfer of a resize": "fetch",
    "rank dies after a transfer of a resize": "chunk",
    "rank dies at the end of a resize": "done",
}
"""By kind, the place of the resize where it dies."""
RESIZING = (2, 4)
"""Of five seeds, those in which ranks come and go."""
MEETINGS = ("invalidate", "drain", "a rank misses a meeting", "ranks mean different meetings")
LAST_FAULTS = ("rank dead", "shutdown", "planner never answers")
"""At most one in a run, and nothing has to be well after it."""

ALL_FAULTS = (*PLANNER_FAULTS, *RANK_FAULTS, *ENGINE_FAULTS, *LAST_FAULTS, *RESIZES, *RESIZE_DEATHS)


@dataclass(frozen=True)
class FaultPlan:
    """One fault: what, on which rank, and when it comes.

    step: the pass after which it is there; stage: it comes when the rank enters this stage after that pass
    """

    kind: str
    rank: int
    step: int
    stage: Stage | str | None = None

    def __str__(self) -> str:
        when = f"after pass {self.step}" + (f", entering {self.stage}" if self.stage else "")
        return f"{self.kind} (rank {self.rank}, {when})"


@dataclass(frozen=True)
class Scenario:
    """All that a run depends on."""

    seed: int
    num_ranks: int
    num_layers: int
    slots_per_rank: int
    num_redundant: int
    num_nodes: int
    config: EplbConfig
    faults: tuple[FaultPlan, ...] = ()
    different_config: Mapping[str, object] = field(default_factory=dict)
    """What `odd_rank` has in its configuration instead."""
    odd_rank: int = 0
    step_s: float = STEP_S
    uneven_steps: float = 0.0
    """Part by which passes of one rank differ from the next's."""
    dummy_ranks: float = 0.0
    """How likely a rank has no requests in a pass."""
    counts_late: bool = False
    """The device's counts come one pass late."""
    tolerates_death: bool = False
    """The engine goes on without a rank that died."""
    resizes: bool = False
    """The engine calls `resize` when ranks die, leave or join."""
    deploys: bool = False
    """The weights are moved to another map before the first pass."""
    odd_deploys: bool = False
    """`odd_rank` is given another map to deploy than the others."""
    real_planner: bool = False
    """The configured algorithm plans."""
    device_group: bool = False
    """Exchanges are enqueued by the forward thread, as NCCL and HCCL want it."""
    keeps_files: bool = False
    """Records are written to a folder."""
    weighted: bool = False
    """The model takes unequal shares."""
    quiet_step: int = 50
    """The pass from which nothing goes wrong any more."""
    initial_map: ExpertMap | None = None
    """What the ranks start from, in place of the layout that engines start with."""
    planned_maps: tuple[ExpertMap, ...] = ()
    """What the planner answers, one after the other while all ranks are active; then it draws maps again."""

    def __post_init__(self) -> None:
        """Raises ValueError for a cluster that cannot be, and a fault that cannot come in this scenario."""
        for name in ("num_ranks", "num_layers", "slots_per_rank", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        most = self.num_ranks * self.slots_per_rank - 1
        if not 0 <= self.num_redundant <= most:
            raise ValueError(f"num_redundant is {self.num_redundant}, expected 0 to {most}")
        if not 0 <= self.odd_rank < self.num_ranks:
            raise ValueError(f"odd_rank is {self.odd_rank}, expected a rank from 0 to {self.num_ranks - 1}")
        for name, one in [
            ("initial_map", self.initial_map),
            *(("planned_maps", m) for m in self.planned_maps),
        ]:
            if one is not None:
                self._check_map(name, one)
        for fault in self.faults:
            if fault.kind not in ALL_FAULTS:
                near = get_close_matches(fault.kind, ALL_FAULTS, 1)
                raise ValueError(f"fault {fault.kind!r}: unknown" + (f", meant {near[0]!r}?" if near else ""))
            if not 0 <= fault.rank < self.num_ranks:
                raise ValueError(f"{fault}: expected a rank from 0 to {self.num_ranks - 1}")
            if not 1 <= fault.step < self.quiet_step:
                raise ValueError(f"{fault}: expected a pass from 1 to quiet_step - 1, {self.quiet_step - 1}")
            if fault.stage is not None and fault.stage not in list(Stage):
                raise ValueError(f"{fault}: expected a stage of {', '.join(Stage)}")
            if fault.stage is None and fault.kind.startswith("exception"):
                raise ValueError(f"{fault}: expected a stage")
            if fault.kind in (*RESIZES, *RESIZE_DEATHS) and not self.resizes:
                raise ValueError(f"{fault}: expected resizes=True")

    def _check_map(self, name: str, given: ExpertMap) -> None:
        shape = (given.num_layers, given.num_logical_experts, given.num_physical_experts)
        expected = (self.num_layers, self.num_logical, self.num_ranks * self.slots_per_rank)
        if shape != expected:
            raise ValueError(f"{name}: layers, experts and slots are {shape}, expected {expected}")
        if given.topology != self.topology:
            raise ValueError(f"{name}: its topology is {given.topology}, expected {self.topology}")

    @property
    def topology(self) -> Topology:
        return Topology(self.num_ranks, min(self.num_nodes, self.num_ranks))

    @property
    def num_logical(self) -> int:
        return self.num_ranks * self.slots_per_rank - self.num_redundant

    def last(self, kind: str) -> bool:
        """Whether a fault of this kind is planned."""
        return any(fault.kind == kind for fault in self.faults)


def draw_scenario(seed: int, num_ranks: int | None = None) -> Scenario:
    """The scenario that `seed` stands for; `num_ranks` in place of the 8 to 64 that it would draw."""
    draw = random.Random(seed)
    ranks = draw.choice((8, 8, 8, 12, 16, 16, 24, 32, 48, 64))
    ranks = ranks if num_ranks is None else num_ranks
    slots = draw.choice((1, 2, 2, 3, 4))
    layers = draw.randint(1, 4)
    interval = draw.choice((4, 6, 8, 12))
    verify = draw.random() < 0.5
    kind = draw.choices(("dynamic", "record only", "static"), (0.9, 0.07, 0.03))[0]
    config = EplbConfig(
        dynamic_eplb=kind == "dynamic",
        expert_map_record_path=None if kind == "static" or draw.random() < 0.3 else "map.json",
        trace_record_path="trace.safetensors" if kind != "static" and draw.random() < 0.2 else None,
        log_balancedness=kind == "record only",
        expert_heat_collection_interval=interval,
        algorithm_execution_interval=draw.choice((0, 0, 2, 5, 9)),
        load_windows=draw.choice((1, 2, 4)),
        load_collection_phase=draw.choice(("all", "all", "decode")),
        layer_updates_per_step=draw.choice((1, 1, 2, 4)),
        commit_margin_steps=draw.choice((1, 2, 4)),
        staging_memory_mb=draw.choice((None, None, 16e-6 * (slots + 1 if seed % 3 else (slots + 1) // 2))),
        transfer_timeout_s=TIMEOUT_S,
        verify_transfers=verify,
        min_balancedness=0.6 if seed % 2 else 1.0,
        weighted_dispatch=draw.random() < 0.2,
        eplb_policy_type=draw.choice(("adaptive", "deepseek", "swift_balancer")),
    )
    quiet = draw.randint(2, 5) * interval + 10
    scenario = Scenario(
        seed=seed,
        num_ranks=ranks,
        num_layers=layers,
        slots_per_rank=slots,
        num_redundant=draw.randint(0, max(0, min(ranks, ranks * slots - ranks))),
        num_nodes=draw.choice((1, 1, 2, 4)),
        config=config,
        uneven_steps=draw.choice((0.0, 0.1, 0.9)),
        dummy_ranks=draw.choice((0.0, 0.0, 0.3, 1.0)),
        counts_late=draw.random() < 0.3,
        tolerates_death=draw.random() < 0.5,
        deploys=draw.random() < 0.15,
        real_planner=draw.random() < 0.1,
        device_group=draw.random() < 0.4,
        keeps_files=draw.random() < 0.1,
        weighted=config.weighted_dispatch and kind == "dynamic",
        quiet_step=quiet,
    )
    scenario = _with_faults(scenario, draw)
    if scenario.real_planner and slots > 1 and draw.random() < 0.5:
        scenario = _surviving(scenario, draw)
    return _with_resizes(scenario, draw) if seed % 5 in RESIZING else scenario


def _with_faults(scenario: Scenario, draw: random.Random) -> Scenario:
    """None, one, or a few at once."""
    if scenario.config.mode.value == "off" or draw.random() < 0.1:
        return scenario
    if scenario.deploys and draw.random() < 0.2 and scenario.num_ranks > 1:
        return replace(scenario, odd_deploys=True, odd_rank=draw.randrange(scenario.num_ranks))
    if draw.random() < 0.03 and scenario.num_ranks > 1:
        different = draw.choice(
            (
                {"layer_updates_per_step": scenario.config.layer_updates_per_step + 1},
                {"verify_transfers": not scenario.config.verify_transfers},
                {"expert_heat_collection_interval": scenario.config.expert_heat_collection_interval + 3},
                {"dynamic_eplb": not scenario.config.dynamic_eplb},
                {"transfer_timeout_s": 2 * TIMEOUT_S},
            )
        )
        odd = draw.randrange(scenario.num_ranks)
        return replace(scenario, different_config=different, odd_rank=odd)
    faults = [_fault(scenario, draw) for _ in range(draw.choice((1, 1, 2, 3, 4)))]
    if draw.random() < 0.2:
        kind = draw.choices(LAST_FAULTS, (0.5, 0.3, 0.2))[0]
        rank = 0 if kind == "planner never answers" else draw.randrange(scenario.num_ranks)
        faults.append(_at(kind, rank, scenario, draw))
    return replace(scenario, faults=tuple(faults))


def _surviving(scenario: Scenario, draw: random.Random) -> Scenario:
    """Room for two replicas of each expert, on two ranks or nodes."""
    config = scenario.config.model_copy(update={"survive": draw.choice(("rank", "node"))})
    half = -(-scenario.num_ranks * scenario.slots_per_rank // 2)
    return replace(scenario, config=config, num_redundant=max(scenario.num_redundant, half))


def _with_resizes(scenario: Scenario, draw: random.Random) -> Scenario:
    """Ranks come and go in between."""
    if scenario.different_config or scenario.odd_deploys or scenario.num_ranks == 1:
        return scenario
    scenario = replace(scenario, num_redundant=_room_to_leave(scenario, draw))
    others = [fault for fault in scenario.faults if fault.kind != "rank dead"]
    resizes = []
    for _ in range(draw.choice((1, 2, 3, 5))):
        kind = draw.choice((*RESIZES, draw.choice(tuple(RESIZE_DEATHS))))
        fault = _at(kind, draw.randrange(scenario.num_ranks), scenario, draw)
        fault = replace(fault, stage=draw.choice(ANY_STAGE) if draw.random() < 0.5 else None)
        if fault.kind == "rank taken for dead" and draw.random() < 0.5:  # who records has most to spoil
            fault = replace(fault, rank=0, stage=Stage.COMMIT)
        resizes.append(fault)
    return replace(
        scenario,
        resizes=True,
        tolerates_death=True,
        faults=(*others, *resizes),
    )


def _room_to_leave(scenario: Scenario, draw: random.Random) -> int:
    """Redundant experts: as drawn, so that some ranks may leave, or all but one."""
    slots, ranks, luck = scenario.slots_per_rank, scenario.num_ranks, draw.random()
    if luck < 0.4:
        return scenario.num_redundant
    if luck < 0.5:
        return slots * (ranks - 1)
    return slots * draw.randint(1, ranks // 2)


def _fault(scenario: Scenario, draw: random.Random) -> FaultPlan:
    """Most faults strike one rank; what all ranks do at once is where a cycle may surprise the next one."""
    kind = draw.choices(
        (draw.choice(PLANNER_FAULTS), draw.choice(RANK_FAULTS), draw.choice(ENGINE_FAULTS)), (0.2, 0.5, 0.3)
    )[0]
    if draw.random() < 0.08:
        kind = "exception in a stage of all ranks"
    if kind == "transfer corrupted" and not scenario.config.verify_transfers:
        kind = "error in fetch"
    return _at(kind, draw.randrange(scenario.num_ranks), scenario, draw)


def _at(kind: str, rank: int, scenario: Scenario, draw: random.Random) -> FaultPlan:
    """Half of the faults come at a stage: that is where most can go wrong."""
    step = draw.randint(1, max(1, scenario.quiet_step - 6))
    stage = None
    if kind.startswith("exception") or (
        kind in (*RANK_FAULTS, "rank dead", "shutdown") and draw.random() < 0.6
    ):
        stage = draw.choice(ANY_STAGE)
    return FaultPlan(kind, rank, step, stage)
