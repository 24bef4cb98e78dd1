"""Compiled kernels of DeepSeek's placement: replicate the hottest experts, then pack with free slots counted.

Arrays are C-contiguous and writable (a read-only array is another type to numba and would compile again).
Sorting is numpy's, outside: it takes as long and compiles for seconds here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel

Load = NDArray[np.float64]
Ids = NDArray[np.int64]
Slots = NDArray[np.int32]
Flags = NDArray[np.bool_]


@kernel
def pack_groups(group_load: Load, order: Ids, num_nodes: int) -> Ids:
    """Node of each expert group: in the given order, each to the least loaded node that still has room.

    group_load: [layers, groups]; order: [layers, groups], group ids, heaviest first. Every node gets
    groups / num_nodes of them; of equally loaded nodes the first.
    """
    num_layers, num_groups = group_load.shape
    node_of_group = np.empty((num_layers, num_groups), np.int64)
    for layer in range(num_layers):
        room = np.full(num_nodes, num_groups // num_nodes, np.int64)
        load = np.zeros(num_nodes, np.float64)
        for group in order[layer]:
            best = -1
            for node in range(num_nodes):
                if room[node] > 0 and (best < 0 or load[node] < load[best]):
                    best = node
            node_of_group[layer, group] = best
            room[best] -= 1
            load[best] += group_load[layer, group]
    return node_of_group


@kernel
def replicate(
    load: Load, node_of_expert: Ids, num_nodes: int, ranks_per_node: int, slots_per_rank: int
) -> Ids:
    """Replicas of each expert: each redundant slot of a node goes to its expert with the highest load per
    replica.

    load, node_of_expert: [layers, experts]. No expert gets more replicas than its node has ranks while
    another has fewer, because two on one rank share nothing. Equal loads per replica: the expert with fewer
    replicas, then the lower one.
    """
    num_layers, num_experts = load.shape
    slots_per_node = ranks_per_node * slots_per_rank
    experts_per_node = num_experts // num_nodes
    most = max(ranks_per_node, (slots_per_node + experts_per_node - 1) // experts_per_node)
    count = np.ones((num_layers, num_experts), np.int64)
    share = load.copy()
    for layer in range(num_layers):
        for node in range(num_nodes):
            for _ in range(slots_per_node - experts_per_node):
                best = -1
                for expert in range(num_experts):
                    if node_of_expert[layer, expert] != node or count[layer, expert] == most:
                        continue
                    gain = share[layer, expert] - share[layer, best] if best >= 0 else np.inf
                    if gain > 0 or (gain == 0 and count[layer, expert] < count[layer, best]):
                        best = expert
                count[layer, best] += 1
                share[layer, best] = load[layer, best] / count[layer, best]
    return count


@kernel
def swap_in(
    expert: int, share: Load, rank: int, ranks: Ids, load: Load, holds: Flags, slots: Slots, used: Ids
) -> bool:
    """Give a replica of `expert` to a full rank that lacks it, whose replica moves to `rank`, which has room.

    Called when every one of `ranks` with a free slot already holds `expert`. Of all exchanges that leave no
    two replicas together the one with the lowest hotter rank is made. Returns whether there is one.

    share: [experts] load of one replica; load, used: [ranks]; holds: [ranks, experts]; slots: [ranks, slots].
    """
    best_rank, best_slot, best_load = -1, -1, np.inf
    for other in ranks:
        if holds[other, expert]:
            continue
        for slot in range(used[other]):
            moved = slots[other, slot]
            if holds[rank, moved]:
                continue
            hotter = max(load[rank] + share[moved], load[other] - share[moved] + share[expert])
            if hotter < best_load:
                best_rank, best_slot, best_load = other, slot, hotter
    if best_rank < 0:
        return False
    moved = slots[best_rank, best_slot]
    slots[best_rank, best_slot] = expert
    slots[rank, used[rank]] = moved
    used[rank] += 1
    holds[best_rank, moved], holds[best_rank, expert], holds[rank, moved] = False, True, True
    load[best_rank] += share[expert] - share[moved]
    load[rank] += share[moved]
    return True


@kernel
def pack_replicas(
    share: Load,
    count: Ids,
    order: Ids,
    node_of_expert: Ids,
    node_ranks: Ids,
    num_ranks: int,
    slots_per_rank: int,
) -> Slots:
    """Experts of each slot, int32 [layers, ranks, slots], -1 on ranks that are on no node: in the given
    order, each replica to the least loaded rank of its node that has a free slot and no replica of it yet.

    share: load of one replica; count: replicas; order: expert ids, heaviest replica first; node_of_expert:
    all [layers, experts]. node_ranks: [nodes, ranks of a node], with as many slots as the node has replicas.
    """
    num_layers, num_experts = share.shape
    slots = np.full((num_layers, num_ranks, slots_per_rank), -1, np.int32)
    for layer in range(num_layers):
        used = np.zeros(num_ranks, np.int64)
        load = np.zeros(num_ranks, np.float64)
        holds = np.zeros((num_ranks, num_experts), np.bool_)
        for expert in order[layer]:
            ranks = node_ranks[node_of_expert[layer, expert]]
            for _ in range(count[layer, expert]):
                best, coolest = -1, -1
                for rank in ranks:
                    if used[rank] == slots_per_rank:
                        continue
                    if coolest < 0 or load[rank] < load[coolest]:
                        coolest = rank
                    if not holds[rank, expert] and (best < 0 or load[rank] < load[best]):
                        best = rank
                if best < 0:
                    if swap_in(expert, share[layer], coolest, ranks, load, holds, slots[layer], used):
                        continue
                    best = coolest  # more replicas than ranks: two must share one
                slots[layer, best, used[best]] = expert
                used[best] += 1
                holds[best, expert] = True
                load[best] += share[layer, expert]
    return slots
