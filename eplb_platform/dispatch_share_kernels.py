"""Compiled kernels of weighted dispatch: the shares of replicas that level the ranks.

A layer's shares are a flow: the load of every expert goes to its replicas. It starts even and is levelled by
the decomposition algorithm for resource allocation (Groenevelt 1991, after Fujishige 1980): a maximum flow
(Dinic 1970) brings all ranks of a block to their mean, or its minimum cut parts the block into hotter ranks
and cooler ones that share no more work; then each part by itself.

Arrays are C-contiguous and writable (a read-only array is another type to numba and would compile again).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Slots = NDArray[np.int32]
Flags = NDArray[np.bool_]

# A rank is level when it exceeds the mean of its block by no more than this part of it: the rounding of sums.
_LEVEL = 1e-12


@kernel
def replicas_by_expert(experts: Slots, first: Ids, replicas: Ids) -> None:
    """Fill first, [experts + 1], and replicas, [slots]: those of an expert are, ascending,
    replicas[first[expert] : first[expert + 1]]. experts: [slots], -1 on inactive ranks.
    """
    first[:] = 0
    for expert in experts:
        if expert >= 0:
            first[expert + 1] += 1
    for expert in range(first.size - 1):
        first[expert + 1] += first[expert]
    filled = first.copy()
    for slot in range(experts.size):
        if experts[slot] >= 0:
            replicas[filled[experts[slot]]] = slot
            filled[experts[slot]] += 1


@kernel
def reach(
    ranks: Ids,
    in_block: Flags,
    level: float,
    slack: float,
    rank_load: Floats,
    experts: Slots,
    first: Ids,
    replicas: Ids,
    flow: Floats,
    rank_depth: Ids,
    expert_depth: Ids,
    queue: Ids,
) -> bool:
    """Breadth first from the ranks hotter than `level` by more than `slack`, along work that can move on;
    returns whether it met a rank below `level`. Fills the depths, -1 where it did not come.

    ranks: of the block; in_block: [ranks]; rank_load: [ranks]; flow: [slots], load that a slot computes;
    experts, first, replicas: see `replicas_by_expert`.
    """
    num_slots = experts.size // rank_load.size
    tail, met = 0, rank_load.size
    for rank in ranks:
        rank_depth[rank] = -1
        if rank_load[rank] > level + slack:
            rank_depth[rank] = 0
            queue[tail] = rank
            tail += 1
        for slot in range(rank * num_slots, (rank + 1) * num_slots):
            expert_depth[experts[slot]] = -1
    head = 0
    while head < tail and rank_depth[queue[head]] < met:
        rank = queue[head]
        head += 1
        for slot in range(rank * num_slots, (rank + 1) * num_slots):
            expert = experts[slot]
            if flow[slot] <= 0.0 or expert_depth[expert] >= 0:
                continue
            expert_depth[expert] = rank_depth[rank]
            for index in range(first[expert], first[expert + 1]):
                other = replicas[index] // num_slots
                if in_block[other] and rank_depth[other] < 0:
                    rank_depth[other] = rank_depth[rank] + 1
                    queue[tail] = other
                    tail += 1
                    if rank_load[other] < level:
                        met = rank_depth[other]
    return met < rank_load.size


@kernel
def step_on(
    rank: int,
    experts: Slots,
    first: Ids,
    replicas: Ids,
    flow: Floats,
    rank_depth: Ids,
    expert_depth: Ids,
    slot_arc: Ids,
    replica_arc: Ids,
    num_slots: int,
) -> bool:
    """Find the next way on from `rank` to a rank one deeper; whether there is one.

    It leads from slot slot_arc[rank] to replicas[replica_arc[expert]]; ways given up are not tried again.
    """
    while slot_arc[rank] < (rank + 1) * num_slots:
        slot = slot_arc[rank]
        expert = experts[slot]
        if flow[slot] > 0.0 and expert_depth[expert] == rank_depth[rank]:
            while replica_arc[expert] < first[expert + 1]:
                if rank_depth[replicas[replica_arc[expert]] // num_slots] == rank_depth[rank] + 1:
                    return True
                replica_arc[expert] += 1
        slot_arc[rank] += 1
    return False


@kernel
def push_from(
    source: int,
    level: float,
    slack: float,
    rank_load: Floats,
    experts: Slots,
    first: Ids,
    replicas: Ids,
    flow: Floats,
    rank_depth: Ids,
    expert_depth: Ids,
    slot_arc: Ids,
    replica_arc: Ids,
    path: Ids,
) -> None:
    """Move load from `source` to ranks below `level` along shortest ways, until it is level or none is left.

    path: [ranks], room for the ranks on the way.
    """
    num_slots = experts.size // rank_load.size
    length = 0
    path[0] = source
    while rank_load[source] > level + slack:
        rank = path[length]
        if rank_load[rank] < level:
            room = level - rank_load[rank]
            moved = min(rank_load[source] - level, room)
            for index in range(length):
                moved = min(moved, flow[slot_arc[path[index]]])
            for index in range(length):
                slot = slot_arc[path[index]]
                flow[slot] -= moved
                flow[replicas[replica_arc[experts[slot]]]] += moved
            # Set, not summed, where the level is reached: what rounding left would be pushed about again.
            rank_load[source] = max(rank_load[source] - moved, level)
            rank_load[rank] = level if moved == room else min(rank_load[rank] + moved, level)
            length = 0
        elif step_on(
            rank, experts, first, replicas, flow, rank_depth, expert_depth, slot_arc, replica_arc, num_slots
        ):
            length += 1
            path[length] = replicas[replica_arc[experts[slot_arc[rank]]]] // num_slots
        elif length == 0:
            return
        else:
            rank_depth[rank] = -2  # a dead end
            length -= 1


@kernel
def level_block(
    ranks: Ids,
    in_block: Flags,
    experts: Slots,
    first: Ids,
    replicas: Ids,
    flow: Floats,
    rank_load: Floats,
    rank_depth: Ids,
    expert_depth: Ids,
    slot_arc: Ids,
    replica_arc: Ids,
    queue: Ids,
) -> bool:
    """Bring the ranks of a block to their mean; False where it cannot be done: then the hotter part of the
    block are the ranks with rank_depth >= 0, which have passed on all work that others hold, too.
    """
    num_slots = experts.size // rank_load.size
    total = 0.0
    for rank in ranks:
        rank_load[rank] = flow[rank * num_slots : (rank + 1) * num_slots].sum()
        total += rank_load[rank]
    level = total / ranks.size
    slack = _LEVEL * level
    while reach(
        ranks,
        in_block,
        level,
        slack,
        rank_load,
        experts,
        first,
        replicas,
        flow,
        rank_depth,
        expert_depth,
        queue,
    ):
        for rank in ranks:
            slot_arc[rank] = rank * num_slots
            for slot in range(rank * num_slots, (rank + 1) * num_slots):
                replica_arc[experts[slot]] = first[experts[slot]]
        for rank in ranks:
            if rank_depth[rank] == 0:
                push_from(
                    rank,
                    level,
                    slack,
                    rank_load,
                    experts,
                    first,
                    replicas,
                    flow,
                    rank_depth,
                    expert_depth,
                    slot_arc,
                    replica_arc,
                    queue,
                )
    hottest = 0.0
    for rank in ranks:
        hottest = max(hottest, rank_load[rank])
    return hottest <= level + slack


@kernel
def level_layer(
    load: Floats, experts: Slots, ranks: Ids, num_ranks: int, first: Ids, replicas: Ids, flow: Floats
) -> None:
    """Fill flow, [slots]: from even shares to the flow whose ranks are level, the hottest first.

    load: [experts]; ranks: the active ones, reordered on return; first, replicas: see `replicas_by_expert`.
    """
    rank_load = np.zeros(num_ranks, np.float64)
    rank_depth = np.empty(num_ranks, np.int64)
    slot_arc = np.empty(num_ranks, np.int64)
    queue = np.empty(num_ranks, np.int64)
    expert_depth = np.empty(load.size, np.int64)
    replica_arc = np.empty(load.size, np.int64)
    in_block = np.zeros(num_ranks, np.bool_)
    for slot in range(experts.size):
        expert = experts[slot]
        flow[slot] = load[expert] / (first[expert + 1] - first[expert]) if expert >= 0 else 0.0
    # Blocks still to level: ranks[start : end].
    start, end = np.zeros(num_ranks + 1, np.int64), np.zeros(num_ranks + 1, np.int64)
    end[0], open_blocks = ranks.size, 1
    while open_blocks:
        open_blocks -= 1
        low, high = start[open_blocks], end[open_blocks]
        block = ranks[low:high].copy()
        for rank in block:
            in_block[rank] = True
        level = level_block(
            block,
            in_block,
            experts,
            first,
            replicas,
            flow,
            rank_load,
            rank_depth,
            expert_depth,
            slot_arc,
            replica_arc,
            queue,
        )
        middle, back = low, high
        for rank in block:
            in_block[rank] = False
            if rank_depth[rank] >= 0:
                ranks[middle] = rank
                middle += 1
            else:
                back -= 1
                ranks[back] = rank
        if level:
            continue
        for part_start, part_end in ((low, middle), (middle, high)):
            # A part as large as the block is one that rounding kept from parting.
            if 1 < part_end - part_start < block.size:
                start[open_blocks], end[open_blocks] = part_start, part_end
                open_blocks += 1


@kernel
def flow_to_shares(
    load: Floats, first: Ids, replicas: Ids, num_slots: int, flow: Floats, shares: Floats
) -> None:
    """Fill shares, [slots]: the part of its expert's load that a slot takes, an even one without load; of two
    replicas on one rank the first takes all. num_slots: of a rank.
    """
    for expert in range(load.size):
        slots = replicas[first[expert] : first[expert + 1]]
        total, num_holders = 0.0, 0
        for index in range(slots.size):
            total += flow[slots[index]]
            num_holders += index == 0 or slots[index] // num_slots != slots[index - 1] // num_slots
        holder = slots[0]
        for slot in slots:
            if slot // num_slots != holder // num_slots or slot == slots[0]:
                holder = slot
                shares[slot] = 0.0 if total > 0.0 else 1.0 / num_holders
            if total > 0.0:
                shares[holder] += flow[slot] / total


@kernel
def level_shares(load: Floats, experts: Slots, active_ranks: Ids, num_ranks: int) -> Floats:
    """[layers, slots], the part of its expert's load that each slot takes so that the ranks are level.

    load: [layers, experts]; experts: [layers, slots], -1 on inactive ranks.
    """
    num_layers, num_experts = load.shape
    shares = np.zeros(experts.shape, np.float64)
    first = np.empty(num_experts + 1, np.int64)
    replicas = np.empty(experts.shape[1], np.int64)
    flow = np.empty(experts.shape[1], np.float64)
    for layer in range(num_layers):
        replicas_by_expert(experts[layer], first, replicas)
        level_layer(load[layer], experts[layer], active_ranks.copy(), num_ranks, first, replicas, flow)
        num_slots = experts.shape[1] // num_ranks
        flow_to_shares(load[layer], first, replicas, num_slots, flow, shares[layer])
    return shares
