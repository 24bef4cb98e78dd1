"""Placement that survives the loss of any one rank, or of any one node: every expert elsewhere too.

The map of any algorithm is repaired where an expert would be lost, at the least loss of balance that a
greedy choice finds, and then improved by swaps that keep what was won.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

Survival: TypeAlias = Literal["none", "rank", "node"]
"""What a map survives the loss of any one of."""
SURVIVALS: tuple[Survival, ...] = get_args(Survival)


def survives(expert_map: ExpertMap, survive: Survival) -> NDArray[np.bool_]:
    """[layers], whether every expert keeps a replica after the loss of any one rank or node."""
    if survive == "none":
        return np.ones(expert_map.num_layers, dtype=np.bool_)
    topology = expert_map.topology
    domain, _ = _domains(topology, survive)
    of_slot = np.repeat(domain, expert_map.slots_per_rank)[_active_slots(expert_map)]
    experts = expert_map.physical_to_logical[:, _active_slots(expert_map)]
    shape = (expert_map.num_layers, expert_map.num_logical_experts)
    lowest = np.full(shape, np.iinfo(np.int32).max, dtype=np.int32)
    highest = np.full(shape, -1, dtype=np.int32)
    layers = np.arange(expert_map.num_layers)[:, None]
    np.minimum.at(lowest, (layers, experts), of_slot[None, :])
    np.maximum.at(highest, (layers, experts), of_slot[None, :])
    alive: NDArray[np.bool_] = np.all(lowest < highest, axis=1)
    return alive


def check_survival(
    survive: str, num_logical_experts: int, num_physical_experts: int, topology: Topology
) -> None:
    """Raises ValueError, with the slots that it takes, where no map survives that."""
    if survive not in SURVIVALS:
        raise ValueError(f"survive is {survive!r}, expected one of {', '.join(map(repr, SURVIVALS))}")
    if survive == "none":
        return
    domain, num_domains = _domains(topology, survive)
    if num_domains < 2:
        raise ValueError(f"survive={survive!r} takes at least 2 active {survive}s, there is {num_domains}")
    ranks = np.bincount(domain[domain >= 0], minlength=num_domains)

    def is_enough(slots: int) -> bool:
        return int(np.minimum(slots * ranks, num_logical_experts).sum()) >= 2 * num_logical_experts

    given = num_physical_experts // topology.num_ranks
    if is_enough(given):
        return
    needed = next(slots for slots in range(given + 1, num_logical_experts + 1) if is_enough(slots))
    raise ValueError(
        f"survive={survive!r} takes {needed} slots on each of {topology.num_active_ranks} active ranks "
        f"({needed * topology.num_ranks} physical experts), so that {num_logical_experts} experts stand on "
        f"two {survive}s each; there are {given} ({num_physical_experts})"
    )


def survivable(placed: ExpertMap, load: NDArray[np.float64], survive: Survival) -> NDArray[np.int32]:
    """`placed` with as few changes as it takes to survive the loss of any one rank or node.

    load: [windows, layers, logical]. Returns int32 [layers, physical]. The caller has checked that it can be.
    """
    from eplb_platform.algorithms.survival_kernels import secure_layers

    topology = placed.topology
    domain, num_domains = _domains(topology, survive)
    table = np.array(placed.physical_to_logical, dtype=np.int32, order="C")
    weight = np.ascontiguousarray(load.sum(axis=0), dtype=np.float64)
    secure_layers(table, weight, placed.slots_per_rank, domain, num_domains)
    return table


def warm_up() -> None:
    """Compile the kernels, or load them from the cache."""
    alone = ExpertMap(np.array([[0, 0, 1, 1]]), 2, Topology(2))
    survivable(alone, np.ones((1, 1, 2)), "rank")


def _active_slots(expert_map: ExpertMap) -> NDArray[np.bool_]:
    """[physical]"""
    return np.repeat(expert_map.topology.is_active, expert_map.slots_per_rank)


def _domains(topology: Topology, survive: str) -> tuple[NDArray[np.int32], int]:
    """[ranks], what falls together with each rank, -1 for inactive ones; and how many there are."""
    active = topology.is_active
    domain = np.arange(topology.num_ranks) if survive == "rank" else topology.node_of_rank
    numbers, numbered = np.unique(domain[active], return_inverse=True)
    result = np.full(topology.num_ranks, -1, dtype=np.int32)
    result[active] = numbered
    return result, len(numbers)
