"""Random placement: valid and nothing more; what any other algorithm has to beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.algorithm import Algorithm
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology


class RandomPlacement(Algorithm):
    """Experts in random order on the ranks, redundant slots spread over random experts; blind to load.

    seed: at least 0; the same seed gives the same map.
    """

    name: ClassVar[str] = "random"

    def __init__(self, *, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed is {seed!r}, expected an integer of at least 0")
        self.seed = seed

    def place(
        self,
        load: NDArray[np.float64],
        *,
        num_physical_experts: int,
        topology: Topology,
        num_expert_groups: int,
        current: ExpertMap | None,
    ) -> NDArray[np.int32]:
        _, num_layers, num_experts = load.shape
        slots_per_rank = num_physical_experts // topology.num_ranks
        active = np.flatnonzero(topology.is_active)
        rng = np.random.default_rng(self.seed)
        replicas = _shuffled_replicas(rng, num_layers, num_experts, len(active) * slots_per_rank)
        # Dealt out one to each rank in turn: neighbours, and so the replicas of one expert, part.
        dealt = replicas.reshape(num_layers, slots_per_rank, len(active)).transpose(0, 2, 1)
        placed = np.full((num_layers, topology.num_ranks, slots_per_rank), -1, dtype=np.int32)
        placed[:, active] = dealt
        return placed.reshape(num_layers, -1)


def _shuffled_replicas(
    rng: np.random.Generator, num_layers: int, num_experts: int, num_slots: int
) -> NDArray[np.int64]:
    """[layers, slots], each expert as often as it has replicas, those side by side, experts in random order.

    Counts differ by at most one, so that none exceeds the ranks while another could take the slot.
    """
    experts = np.tile(np.arange(num_experts), (num_layers, 1))
    order = rng.permuted(experts, axis=1)
    count = np.full(num_experts, num_slots // num_experts)
    count[: num_slots % num_experts] += 1
    return np.repeat(order.ravel(), rng.permuted(np.tile(count, (num_layers, 1)), axis=1).ravel()).reshape(
        num_layers, num_slots
    )
