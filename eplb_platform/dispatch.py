"""Which replica takes a token: the tables that routing reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap


def even_table(expert_map: ExpertMap, width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tables by which the replicas of an expert share its tokens evenly.

    width: entries of a row, fixed for the life of a device table; at least the most replicas of an expert.

    Returns the physical experts of each logical one, [layers, logical, width], ascending and padded with -1,
    and how many each has, [layers, logical]. Token t of expert e goes to entry t % count of e's row.
    Raises ValueError when an expert has more than `width` replicas.
    """
    return expert_map.logical_to_physical_padded(width), expert_map.replica_count
