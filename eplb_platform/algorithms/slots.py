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

    kept = _by_rank(placed, current)
    keep_rank_slots(kept, _writable(current))
    return kept.reshape(placed.shape)


def keep_ranks(placed: Slots, current: ExpertMap, node_ranks: NDArray[np.int64]) -> Slots:
    """`placed` with whole ranks exchanged so that more experts are where `current` has them.

    placed: int32 [layers, physical]. node_ranks: [nodes, ranks of a node]; ranks change places within their
    node, nodes as a whole with each other, which changes neither balance nor what shares a node.
    Returns a new array.
    """
    from eplb_platform.algorithms.slot_kernels import exchange_ranks

    kept = _by_rank(placed, current)
    exchange_ranks(kept, _writable(current), node_ranks, current.num_logical_experts)
    return kept.reshape(placed.shape)


def _by_rank(placed: Slots, current: ExpertMap) -> Slots:
    """A copy of `placed` as [layers, ranks, slots]."""
    return np.array(placed, dtype=np.int32, order="C").reshape(len(placed), current.topology.num_ranks, -1)


def _writable(current: ExpertMap) -> Slots:
    """A copy of the current map as [layers, ranks, slots]: to the kernels a read-only array is another type."""
    return np.array(current.by_rank(), dtype=np.int32, order="C")
