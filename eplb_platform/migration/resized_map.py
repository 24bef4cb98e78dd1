"""The map that a model goes on with when ranks leave and join: what stays where it is, and the least besides.

It is blind to load. The next cycle balances; this is what has to be moved before the next forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

Ids = NDArray[np.int32]


def experts_without(expert_map: ExpertMap, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(layer, logical expert) of every expert that has no replica outside `ranks`, ascending."""
    table = expert_map.physical_to_logical
    elsewhere = np.where(_slots_of(ranks, expert_map), np.int32(-1), table)
    held = np.zeros((expert_map.num_layers, expert_map.num_logical_experts + 1), dtype=np.bool_)
    np.put_along_axis(held, elsewhere, True, axis=1)  # -1 falls into the last column
    return [(layer, expert) for layer, expert in np.argwhere(~held[:, :-1]).tolist()]


def resized_map(
    current: ExpertMap, topology: Topology, *, staying: Sequence[int], joining: Sequence[int]
) -> ExpertMap:
    """`current` on the active ranks of `topology`: `staying`, whose experts are there, and `joining`, empty.

    What has no replica on a rank that stays comes to ranks that join, then in place of spare replicas; the
    slots that are still free then take replicas of experts that have the fewest. Every expert that gives way
    keeps a replica on a rank that stays. Raises ValueError where the active ranks have too few slots.
    """
    slots = current.slots_per_rank
    room = slots * topology.num_active_ranks
    if room < current.num_logical_experts:
        short = current.num_logical_experts - room
        raise ValueError(
            f"{current.num_logical_experts} logical experts do not fit in {slots} slots on each of "
            f"{topology.num_active_ranks} active ranks: {short} slots are missing, keep "
            f"{-(-short // slots)} more ranks"
        )
    table = np.where(_slots_of(staying, current), current.physical_to_logical, np.int32(-1))
    by_rank = table.reshape(current.num_layers, -1, slots)
    for layer in by_rank:
        _complete(layer, current.num_logical_experts, staying, joining)
    return ExpertMap(table, current.num_logical_experts, topology)


def _complete(layer: Ids, num_experts: int, staying: Sequence[int], joining: Sequence[int]) -> None:
    """Fill one layer [ranks, slots], of which `staying` are full, `joining` free and others to be left."""
    count = np.bincount(layer[layer >= 0], minlength=num_experts)
    missing = np.flatnonzero(count == 0).tolist()
    free = [(rank, slot) for slot, rank in product(range(layer.shape[1]), joining)]
    housed = min(len(missing), len(free))
    for (rank, slot), expert in zip(free[:housed], missing[:housed], strict=True):
        layer[rank, slot] = expert
    if missing[housed:]:
        _replace_spares(layer, count, missing[housed:], np.array(staying))
    count = np.bincount(layer[layer >= 0], minlength=num_experts)
    for rank, slot in free[housed:]:
        there = np.zeros(num_experts, dtype=np.int64)
        there[layer[rank, :][layer[rank, :] >= 0]] = layer.size
        expert = int(np.argmin(count + there))
        layer[rank, slot] = expert
        count[expert] += 1


def _replace_spares(layer: Ids, count: NDArray[np.int64], missing: Sequence[int], staying: Ids) -> None:
    """Put `missing` in the place of replicas that are spare, the most replicated first, ranks taking turns.

    count: [logical], replicas on the ranks that stay
    """
    taken = np.zeros(len(staying), dtype=np.int64)
    for expert in missing:
        held = layer[staying]
        twice = np.array([[(row == one).sum() > 1 for one in row] for row in held])
        spare = count[held] > 1
        worth = np.where(spare, ((twice * layer.size + count[held]) * layer.size) - taken[:, None], -1)
        index, slot = np.unravel_index(int(np.argmax(worth)), worth.shape)
        count[held[index, slot]] -= 1
        layer[staying[index], slot] = expert
        taken[index] += 1


def _slots_of(ranks: Sequence[int], expert_map: ExpertMap) -> NDArray[np.bool_]:
    """bool [physical], whether a slot is on one of `ranks`."""
    return np.isin(np.arange(expert_map.num_physical_experts) // expert_map.slots_per_rank, ranks)
