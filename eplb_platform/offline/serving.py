"""Who serves simulated steps: one map throughout, a map that is planned once, or the real balancer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms import DEFAULT_ALGORITHM, rebalance_experts
from eplb_platform.config import EplbConfig
from eplb_platform.dispatch import table_shares
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.migration.staging import BYTES_PER_MB
from eplb_platform.offline.hardware import HardwareProfile
from eplb_platform.offline.simulated_time import (
    SimulatedClock,
    SimulatedGroup,
    SimulatedMigrator,
    SimulatedPlanner,
    SimulatedStaging,
    SingleVoice,
    Timeline,
)
from eplb_platform.offline.step_time import RankWork, StepTime, even_shares, rank_work
from eplb_platform.runtime.cycle import RankLink
from eplb_platform.runtime.gate import ForwardGate
from eplb_platform.runtime.meeting import ForwardMeetings
from eplb_platform.runtime.planning import AlgorithmPlanner
from eplb_platform.runtime.start import assemble
from eplb_platform.topology import Topology

if TYPE_CHECKING:
    from eplb_platform.migration.transfer import Migrator

ROUTING_TABLE_WIDTH = 64
"""Entries of a row of the routing tables, where an algorithm asks for weighted dispatch."""

Tokens = NDArray[np.int64]

# Keys of eplb_config that name files, which a simulation neither reads nor writes, and what no trace holds.
_LEFT_OUT = {
    "expert_map_path": None,
    "expert_map_record_path": None,
    "trace_record_path": None,
    "compute_cost_record_path": None,
    "enable_expert_compute_profiling": False,
}


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    num_redundant_experts: slots beyond one for each expert, a multiple of the ranks with the experts
    config: of eplb_config; its algorithm is each contender's own
    planning_s: simulated seconds that a plan takes
    """

    topology: Topology
    num_redundant_experts: int
    profile: HardwareProfile
    config: EplbConfig
    num_expert_groups: int = 1
    planning_s: float = 0.5


class Contender(Protocol):
    """Serves the steps one after the other."""

    name: str

    def serve(self, load: Tokens, phase: Phase) -> tuple[RankWork, float]:
        """One pass of load [layers, logical]: what the ranks had to do, and the seconds until the next."""
        ...

    def counters(self) -> Mapping[str, object]:
        """Further fields of its `Result`."""
        ...

    def close(self) -> None:
        """No pass comes after this."""
        ...


class FixedMap:
    """Serves with one map."""

    def __init__(self, name: str, expert_map: ExpertMap, setting: Setting) -> None:
        self.name = name
        self._step_time = StepTime(setting.profile, setting.topology)
        self._follow(expert_map)

    def _follow(self, expert_map: ExpertMap) -> None:
        self._map = expert_map
        self._share = even_shares(expert_map)

    def serve(self, load: Tokens, phase: Phase) -> tuple[RankWork, float]:
        work = rank_work(load, self._map, self._share)
        return work, self._step_time.step(work, phase)

    def counters(self) -> Mapping[str, object]:
        return {}

    def close(self) -> None:
        return None


class PlannedOnce(FixedMap):
    """Serves the first collection as engines start, and then with what is planned on it."""

    def __init__(self, name: str, initial: ExpertMap, setting: Setting) -> None:
        super().__init__(name, initial, setting)
        self._setting = setting
        self._left = setting.config.expert_heat_collection_interval
        windows = setting.config.num_load_windows
        self._window = np.arange(self._left) * windows // self._left
        self._load = np.zeros((windows, initial.num_layers, initial.num_logical_experts))

    def serve(self, load: Tokens, phase: Phase) -> tuple[RankWork, float]:
        if self._left:
            self._load[self._window[-self._left]] += load
        served = super().serve(load, phase)
        if self._left == 1:
            self._follow(
                rebalance_experts(
                    self._load,
                    num_physical_experts=self._map.num_physical_experts,
                    topology=self._map.topology,
                    num_expert_groups=self._setting.num_expert_groups,
                    algorithm=DEFAULT_ALGORITHM,
                ).expert_map
            )
        self._left = max(0, self._left - 1)
        return served


class _Model:
    """What the balancer routes: shares of the slots instead of weights and tables."""

    routing_table_width = ROUTING_TABLE_WIDTH
    expert_weights = ()

    def __init__(self, expert_map: ExpertMap) -> None:
        self.expert_map = expert_map
        self._follow(expert_map)
        self.share = even_shares(expert_map)

    def _follow(self, expert_map: ExpertMap) -> None:
        self.expert_map = expert_map
        layers = np.arange(expert_map.num_layers)[:, None]
        self._first_slot = (layers, expert_map.logical_to_physical[:, :, 0])

    def physical_load(self, load: Tokens) -> Tokens:
        """[layers, physical]: the balancer adds up the replicas of an expert, so the first may have all."""
        counts = np.zeros(self.expert_map.physical_to_logical.shape, dtype=np.int64)
        counts[self._first_slot] = load
        return counts

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None:
        chosen = list(layers)
        self._follow(expert_map)
        self.share[chosen] = even_shares(expert_map)[chosen]

    def apply_tables(
        self,
        layers: Sequence[int],
        expert_map: ExpertMap,
        logical_to_physical: NDArray[np.int32],
        count: NDArray[np.int32],
    ) -> None:
        chosen = list(layers)
        self._follow(expert_map)
        of_layers = ExpertMap(
            expert_map.physical_to_logical[chosen], expert_map.num_logical_experts, expert_map.topology
        )
        self.share[chosen] = table_shares(of_layers, logical_to_physical, count)


class Balanced:
    """Serves with the balancer, which observes, plans and moves by one algorithm."""

    def __init__(
        self, algorithm: str, initial: ExpertMap, setting: Setting, *, name: str | None = None
    ) -> None:
        self.name = name or algorithm
        given = setting.config.model_dump() | _LEFT_OUT
        config = EplbConfig(**(given | {"dynamic_eplb": True, "eplb_policy_type": algorithm}))
        self._expert_bytes = setting.profile.model.expert_bytes
        self._step_time = StepTime(setting.profile, setting.topology)
        self._clock = SimulatedClock()
        self._timeline = Timeline(self._clock)
        self._group = SimulatedGroup(self._clock, self._step_time)
        slots = staging_slots(config, initial, self._expert_bytes)
        staging = SimulatedStaging(slots, int(slots * self._expert_bytes))
        self._migrator = SimulatedMigrator(self._clock, self._step_time, staging)
        self._model = _Model(initial)
        plane = SingleVoice(self._clock, setting.profile.links.agreement_ms / 1e3)
        link = RankLink(0, 1, plane, self._group, self._clock, ForwardGate())
        planner = AlgorithmPlanner(
            algorithm=algorithm,
            num_expert_groups=setting.num_expert_groups,
            timeout_s=config.transfer_timeout_s,
            min_balancedness=config.min_balancedness,
            max_moved_experts_per_layer=config.max_moved_experts_per_layer,
        )
        planner.warm_up()
        self._planner = SimulatedPlanner(planner, self._clock, time.perf_counter, setting.planning_s)
        self._balancer = assemble(
            config,
            self._model,
            link,
            ForwardMeetings(plane, link),
            model_name=self.name,
            expert_map=initial,
            migrator=cast("Migrator", self._migrator),
            planner=self._planner,
            recorder=None,
            tracer=None,
            background=self._timeline,
        )

    def serve(self, load: Tokens, phase: Phase) -> tuple[RankWork, float]:
        started = self._clock.seconds
        work = rank_work(load, self._model.expert_map, self._model.share)
        links = self._step_time.profile.links
        free_links = 1 - links.migration_share if self._group.is_fetching else 1.0
        self._timeline.pass_time(self._step_time.step(work, phase, free_links=free_links))
        self._timeline.run(self._balancer.stepping(self._model.physical_load(load), phase=phase))
        return work, self._clock.seconds - started

    def counters(self) -> Mapping[str, object]:
        stats = self._balancer.stats
        return {
            "cycles": stats.cycles,
            "failed_cycles": stats.failed_cycles,
            "commits": stats.commits,
            "skipped_layers": stats.skipped_layers,
            "experts_moved": self._group.experts_sent,
            "bytes_moved": self._group.experts_sent * self._expert_bytes,
            "wait_s": stats.wait_s,
            "longest_wait_s": stats.longest_wait_s,
            "swap_s": self._migrator.swap_s,
            "longest_swap_s": self._migrator.longest_swap_s,
            "planning_s": tuple(self._planner.seconds),
            "last_error": stats.last_error,
        }

    def close(self) -> None:
        self._timeline.end()


def staging_slots(config: EplbConfig, expert_map: ExpertMap, expert_bytes: float) -> int:
    """Experts that a rank's staging holds, as `migration.staging` counts them. Raises ValueError for none."""
    slots = min(config.layer_updates_per_step, expert_map.num_layers) * expert_map.slots_per_rank
    if config.staging_memory_mb is not None:
        slots = min(slots, int(config.staging_memory_mb * BYTES_PER_MB // expert_bytes))
    if slots < 1:
        raise ValueError(
            f"staging_memory_mb={config.staging_memory_mb:g} does not hold one expert "
            f"({expert_bytes / BYTES_PER_MB:.1f} MB)"
        )
    return slots
