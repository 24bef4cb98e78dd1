"""The compiled part of the step-time model: what each rank has to do in each layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel


@kernel
def rank_work(
    load: NDArray[np.float64],
    slots: NDArray[np.int32],
    share: NDArray[np.float64],
    num_ranks: int,
    tokens: NDArray[np.float64],
    activated: NDArray[np.float64],
) -> None:
    """Fill `tokens` and `activated`, [layers, ranks].

    load: [layers, logical]. slots: [layers, physical], the expert of each, -1 for none.
    share: [layers, physical], the part of its expert's tokens that a slot takes.
    A slot with less than one token counts as that part of an activated one.
    """
    num_layers, num_slots = slots.shape
    slots_per_rank = num_slots // num_ranks
    for layer in range(num_layers):
        for rank in range(num_ranks):
            of_rank = 0.0
            active = 0.0
            for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
                expert = slots[layer, slot]
                if expert >= 0:
                    of_slot = load[layer, expert] * share[layer, slot]
                    of_rank += of_slot
                    active += min(of_slot, 1.0)
            tokens[layer, rank] = of_rank
            activated[layer, rank] = active
