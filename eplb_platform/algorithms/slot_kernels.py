"""Compiled kernels that lay a new placement over the one in use, so that what can stay does stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.jit import kernel

Ids = NDArray[np.int64]
Slots = NDArray[np.int32]


@kernel
def keep_rank_slots(new: Slots, current: Slots) -> None:
    """Reorder, in place, the slots within each rank so that an expert that stays keeps its slot.

    new: [layers, ranks, slots]; current: [layers, ranks, slots of the current map]. Newcomers take the slots
    left over, in the order they had. Of two replicas on one rank each may keep one slot.
    """
    num_layers, num_ranks, num_slots = new.shape
    common = min(num_slots, current.shape[2])
    kept = np.empty(num_slots, np.int32)
    for layer in range(num_layers):
        for rank in range(num_ranks):
            experts = new[layer, rank]
            kept[:] = -1
            for slot in range(common):
                for index in range(num_slots):
                    if experts[index] >= 0 and experts[index] == current[layer, rank, slot]:
                        kept[slot] = experts[index]
                        experts[index] = -1
                        break
            free = 0
            for index in range(num_slots):
                if experts[index] >= 0:
                    while kept[free] >= 0:
                        free += 1
                    kept[free] = experts[index]
            experts[:] = kept


@kernel
def match(overlap: Ids) -> Ids:
    """Partner of each row: greedily the pair with the largest overlap, then the lowest row and column.

    overlap: [n, n], each at least 0. Every column is the partner of one row.
    """
    n = overlap.shape[0]
    partner = np.full(n, -1, np.int64)
    taken = np.zeros(n, np.bool_)
    for value in range(overlap.max(), -1, -1):
        for row in range(n):
            if partner[row] >= 0:
                continue
            for column in range(n):
                if not taken[column] and overlap[row, column] == value:
                    partner[row] = column
                    taken[column] = True
                    break
    return partner


@kernel
def count_common(new: Slots, current: Slots, num_experts: int) -> Ids:
    """Slots of block i of `new` whose expert block j of `current` holds too: [blocks, blocks].

    new, current: [blocks, slots]; a block is a rank or a node.
    """
    num_blocks = new.shape[0]
    holds = np.zeros((num_experts, num_blocks), np.bool_)
    for block in range(num_blocks):
        for expert in current[block]:
            if expert >= 0:  # a rank that joins anew held nothing
                holds[expert, block] = True
    common = np.zeros((num_blocks, num_blocks), np.int64)
    for block in range(num_blocks):
        for expert in new[block]:
            for other in range(num_blocks):
                if holds[expert, other]:
                    common[block, other] += 1
    return common


@kernel
def exchange_blocks(new: Slots, current: Slots, num_experts: int) -> None:
    """Permute, in place, the blocks of `new` so that each meets a block of `current` much like it.

    new: [blocks, slots]; current: [blocks, slots of the current map].
    """
    partner = match(count_common(new, current, num_experts))
    blocks = new.copy()
    for block in range(new.shape[0]):
        new[partner[block]] = blocks[block]


@kernel
def exchange_ranks(new: Slots, current: Slots, node_ranks: Ids, num_experts: int) -> None:
    """Permute, in place, whole nodes and then whole ranks within each node towards the current map.

    new, current: [layers, ranks, slots]; node_ranks: [nodes, ranks of a node], the ranks that serve.
    """
    num_nodes, ranks_per_node = node_ranks.shape
    ranks = node_ranks.copy().reshape(-1)
    for layer in range(new.shape[0]):
        placed = new[layer][ranks]
        held = current[layer][ranks]
        if num_nodes > 1:
            exchange_blocks(placed.reshape(num_nodes, -1), held.reshape(num_nodes, -1), num_experts)
        for node in range(num_nodes):
            first, last = node * ranks_per_node, (node + 1) * ranks_per_node
            exchange_blocks(placed[first:last], held[first:last], num_experts)
        for index in range(ranks.shape[0]):
            new[layer, ranks[index]] = placed[index]
