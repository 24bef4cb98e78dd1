"""The compiled part of the trace: from slots to logical experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel


@kernel
def fold_load(
    physical_load: NDArray[np.int32], physical_to_logical: NDArray[np.int32], load: NDArray[np.int64]
) -> None:
    """Add [layers, physical] tokens to `load` [layers, logical]; slots that hold nothing are ignored."""
    layers, slots = physical_load.shape
    for layer in range(layers):
        for slot in range(slots):
            expert = physical_to_logical[layer, slot]
            if expert >= 0:
                load[layer, expert] += physical_load[layer, slot]
