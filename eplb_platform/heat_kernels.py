"""The compiled part of expert load collection: from slots to logical experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel


@kernel
def fold_load(
    physical_load: NDArray[np.integer],
    physical_to_logical: NDArray[np.int32],
    layers: NDArray[np.int64],
    load: NDArray[np.int64],
) -> None:
    """Add the tokens of `layers` in `physical_load` [layers, physical] to `load` [layers, logical].

    Slots that hold nothing are ignored. Integers all through: exact for counts of any size.
    """
    slots = physical_load.shape[1]
    for layer in layers:
        for slot in range(slots):
            expert = physical_to_logical[layer, slot]
            if expert >= 0:
                load[layer, expert] += physical_load[layer, slot]
