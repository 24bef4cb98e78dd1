"""Compiled kernels of DeepSeek's placement: replicate the hottest experts, then pack with free slots counted.

Every kernel works on one layer or loops over the layers itself; arrays are C-contiguous and writable (a
read-only array is another type to numba and would compile again).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.jit import kernel

Load = NDArray[np.float64]
Ids = NDArray[np.int64]
Slots = NDArray[np.int32]
Flags = NDArray[np.bool_]


@kernel
def pack_groups(group_load: Load, num_nodes: int) -> Ids:
    """Node of each expert group: heaviest first, each to the least loaded node that still has room.

    group_load: [groups]. Every node gets groups / num_nodes of them. Ties go to the lower group and node.
    """
    num_groups = group_load.shape[0]
    room = np.full(num_nodes, num_groups // num_nodes, np.int64)
    load = np.zeros(num_nodes, np.float64)
    node_of_group = np.empty(num_groups, np.int64)
    for group in np.argsort(-group_load, kind="mergesort"):
        best = -1
        for node in range(num_nodes):
            if room[node] > 0 and (best < 0 or load[node] < load[best]):
                best = node
        node_of_group[group] = best
        room[best] -= 1
        load[best] += group_load[group]
    return node_of_group


@kernel
def replicate(load: Load, num_slots: int, num_ranks: int) -> Ids:
    """Replicas of each expert: each redundant slot goes to the expert with the highest load per replica.

    load: [experts]. No expert gets more replicas than ranks while another has fewer, because two on one rank
    share nothing. Equal loads per replica: the expert with fewer replicas, then the lower one.
    """
    num_experts = load.shape[0]
    most = max(num_ranks, (num_slots + num_experts - 1) // num_experts)
    count = np.ones(num_experts, np.int64)
    share = load.copy()
    for _ in range(num_slots - num_experts):
        best = -1
        for expert in range(num_experts):
            if count[expert] == most:
                continue
            if (
                best < 0
                or share[expert] > share[best]
                or (share[expert] == share[best] and count[expert] < count[best])
            ):
                best = expert
        count[best] += 1
        share[best] = load[best] / count[best]
    return count


@kernel
def swap_in(expert: int, share: Load, rank: int, load: Load, holds: Flags, slots: Slots, used: Ids) -> bool:
    """Give a replica of `expert` to a full rank that lacks it, whose replica moves to `rank`, which has room.

    Called when every rank with a free slot already holds `expert`. Of all exchanges that leave no two
    replicas together the one with the lowest hotter rank is made. Returns whether there is one.

    slots: [ranks, slots] experts placed so far; used: [ranks] how many; holds: [ranks, experts].
    """
    best_rank, best_slot, best_load = -1, -1, np.inf
    for other in range(load.shape[0]):
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
def pack_replicas(share: Load, count: Ids, num_ranks: int, slots_per_rank: int) -> Slots:
    """Experts of each rank's slots, int32 [ranks, slots]: heaviest replica first, each to the least loaded
    rank that has a free slot and not yet a replica of that expert.

    share: [experts] load of one replica; count: [experts] replicas, ranks * slots in all.
    """
    slots = np.empty((num_ranks, slots_per_rank), np.int32)
    used = np.zeros(num_ranks, np.int64)
    load = np.zeros(num_ranks, np.float64)
    holds = np.zeros((num_ranks, share.shape[0]), np.bool_)
    for expert in np.argsort(-share, kind="mergesort"):
        for _ in range(count[expert]):
            best, coolest = -1, -1
            for rank in range(num_ranks):
                if used[rank] == slots_per_rank:
                    continue
                if coolest < 0 or load[rank] < load[coolest]:
                    coolest = rank
                if not holds[rank, expert] and (best < 0 or load[rank] < load[best]):
                    best = rank
            if best < 0:
                if swap_in(expert, share, coolest, load, holds, slots, used):
                    continue
                best = coolest  # more replicas than ranks: two must share one
            slots[best, used[best]] = expert
            used[best] += 1
            holds[best, expert] = True
            load[best] += share[expert]
    return slots


@kernel
def experts_on_node(load: Load, node_of_group: Ids, node: int) -> Ids:
    """Ascending ids of the experts whose group is on `node`."""
    group_size = load.shape[0] // node_of_group.shape[0]
    experts = np.empty(load.shape[0], np.int64)
    found = 0
    for expert in range(load.shape[0]):
        if node_of_group[expert // group_size] == node:
            experts[found] = expert
            found += 1
    return experts[:found].copy()


@kernel
def place_layers(load: Load, node_ranks: Ids, num_groups: int, num_ranks: int, slots_per_rank: int) -> Slots:
    """Place every layer: groups on nodes, replicas within each node, replicas on the node's ranks.

    load: [layers, experts]. node_ranks: [nodes, ranks of a node], the ranks that serve. Global placement is
    one node with all ranks and one group. Returns int32 [layers, ranks * slots], -1 on ranks left out.
    """
    num_layers, num_experts = load.shape
    num_nodes, ranks_per_node = node_ranks.shape
    group_size = num_experts // num_groups
    placed = np.full((num_layers, num_ranks * slots_per_rank), -1, np.int32)
    for layer in range(num_layers):
        group_load = np.zeros(num_groups, np.float64)
        for expert in range(num_experts):
            group_load[expert // group_size] += load[layer, expert]
        node_of_group = pack_groups(group_load, num_nodes)
        for node in range(num_nodes):
            experts = experts_on_node(load[layer], node_of_group, node)
            node_load = load[layer][experts]
            count = replicate(node_load, ranks_per_node * slots_per_rank, ranks_per_node)
            slots = pack_replicas(node_load / count, count, ranks_per_node, slots_per_rank)
            for index in range(ranks_per_node):
                first = node_ranks[node, index] * slots_per_rank
                for slot in range(slots_per_rank):
                    placed[layer, first + slot] = experts[slots[index, slot]]
    return placed
