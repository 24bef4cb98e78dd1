"""Compiled kernels that lay a new placement over the one in use, so that what can stay does stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel

Ids = NDArray[np.int64]
Slots = NDArray[np.int32]


@kernel
def keep_rank_slots(new: Slots, current: Slots) -> Slots:
    """`new` with the slots within each rank reordered so that an expert that stays keeps its slot.

    new: [layers, ranks, slots]; current: [layers, ranks, slots of the current map]. Newcomers take the slots
    left over, in the order they had. Of two replicas on one rank each may keep one slot.
    """
    num_layers, num_ranks, num_slots = new.shape
    kept = np.full((num_layers, num_ranks, num_slots), -1, np.int32)
    stays = np.empty(num_slots, np.bool_)
    for layer in range(num_layers):
        for rank in range(num_ranks):
            for index in range(num_slots):
                stays[index] = False
                expert = new[layer, rank, index]
                for slot in range(min(num_slots, current.shape[2])):
                    if current[layer, rank, slot] == expert and kept[layer, rank, slot] != expert:
                        kept[layer, rank, slot] = expert
                        stays[index] = True
                        break
            free = 0
            for index in range(num_slots):
                if stays[index]:
                    continue
                while free < num_slots and kept[layer, rank, free] >= 0:
                    free += 1
                if free < num_slots:
                    kept[layer, rank, free] = new[layer, rank, index]
                    free += 1
    return kept


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
def match_blocks(new: Slots, current: Slots, num_experts: int) -> Ids:
    """For each block of `current` the block of `new` that should take its place: [layers, blocks].

    new: [layers, blocks, slots]; current: [layers, blocks, slots of the current map]. Greedily the pair with
    the most experts in common, then the lowest new and the lowest current one.
    """
    num_layers, num_blocks, num_slots = new.shape
    source = np.full((num_layers, num_blocks), -1, np.int64)
    for layer in range(num_layers):
        common = count_common(new[layer], current[layer], num_experts)
        matched = np.zeros(num_blocks, np.bool_)
        for value in range(num_slots, -1, -1):
            for block in range(num_blocks):
                for place in range(num_blocks):
                    if matched[block]:
                        break
                    if source[layer, place] < 0 and common[block, place] == value:
                        source[layer, place] = block
                        matched[block] = True
    return source
