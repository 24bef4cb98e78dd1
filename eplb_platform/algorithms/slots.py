"""What a rearrangement can leave in place: whole ranks by their content, and experts in their slots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap

Slots = NDArray[np.int32]


def keep_slots(placed: Slots, current: ExpertMap) -> Slots:
    """`placed` with the slots of each rank reordered: an expert that stays on its rank keeps its slot.

    placed: int32 [layers, physical], the logical expert of each slot, -1 on inactive ranks. The number of
    slots may differ from that of `current`; layers and ranks may not. Returns a new array.
    """
    from eplb_platform.algorithms.slot_kernels import keep_rank_slots

    return keep_rank_slots(_by_rank(placed, current), _by_rank(current.physical_to_logical, current)).reshape(
        placed.shape
    )


def keep_ranks(placed: Slots, current: ExpertMap, node_ranks: NDArray[np.int64]) -> Slots:
    """`placed` with whole ranks exchanged so that more experts are where `current` has them.

    placed: int32 [layers, physical]. node_ranks: [nodes, ranks of a node]; ranks change places within their
    node, nodes as a whole with each other, which changes neither balance nor what shares a node.
    Returns a new array.
    """
    num_layers, (num_nodes, ranks_per_node) = len(placed), node_ranks.shape
    serving = node_ranks.reshape(-1)
    kept = _by_rank(placed, current)
    old = np.take(_by_rank(current.physical_to_logical, current), serving, axis=1)
    new = np.take(kept, serving, axis=1)
    if num_nodes > 1:
        new = _exchange(
            new.reshape(num_layers, num_nodes, -1), old.reshape(num_layers, num_nodes, -1), current
        )
    new = _exchange(
        new.reshape(num_layers * num_nodes, ranks_per_node, -1),
        old.reshape(num_layers * num_nodes, ranks_per_node, -1),
        current,
    )
    kept[:, serving] = new.reshape(num_layers, len(serving), -1)
    return kept.reshape(placed.shape)


def _exchange(new: Slots, old: Slots, current: ExpertMap) -> Slots:
    """The blocks of `new`, [layers, blocks, slots], each in the place of the block of `old` most like it."""
    from eplb_platform.algorithms.slot_kernels import match_blocks

    source = match_blocks(new, old, current.num_logical_experts)
    return np.take_along_axis(new, source[:, :, None], axis=1)


def _by_rank(physical_to_logical: Slots, current: ExpertMap) -> Slots:
    """A copy as [layers, ranks, slots], writable: to the kernels a read-only array is another type."""
    num_layers, num_ranks = len(physical_to_logical), current.topology.num_ranks
    return np.array(physical_to_logical, dtype=np.int32, order="C").reshape(num_layers, num_ranks, -1)
