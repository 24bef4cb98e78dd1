"""The compiled part of the forward path. Without the compiler (NUMBA_DISABLE_JIT=1) it is plain Python."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int32] | NDArray[np.int64]
MapIds = Callable[[Integers, Integers, Integers, Integers, bool, int, NDArray[np.int64]], int]

ALL_MAPPED = -1
NOT_COUNTED = -2

_Index = np.uint64
_GOLDEN_RATIO = 2654435769  # 2**32 / 1.618...
_LOW_32_BITS = 0xFFFFFFFF


def _compiled(function: MapIds) -> MapIds:
    """Compile without the interpreter lock, and keep the result on disk where there is a place for it."""
    try:
        compiled: MapIds = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that can be written
        compiled = numba.njit(nogil=True)(function)
    return compiled


@_compiled
def map_ids(
    logical_ids: Integers,
    logical_to_physical: Integers,
    replica_count: Integers,
    load: Integers,
    record: bool,
    offset: int,
    physical_ids: NDArray[np.int64],
) -> int:
    """Fill `physical_ids` and count into `load`.

    Returns ALL_MAPPED, or the flat index of the first id that is no expert, or NOT_COUNTED if some physical
    ids are too large for `load`.

    Replica: the fractional part of (row + offset) times the golden ratio, scaled to the replica count. Rows
    that follow each other fall evenly into the replicas; so does every second or third row, all of which a
    choice by row modulo replicas could send to one replica.
    """
    # Indices are unsigned: a signed one costs a third more time, as it might count from the end.
    num_logical, num_physical = _Index(logical_to_physical.shape[0]), _Index(load.shape[0])
    not_counted = 0
    for row in range(logical_ids.shape[0]):
        fraction = _Index(((row + offset) * _GOLDEN_RATIO) & _LOW_32_BITS)
        for choice in range(logical_ids.shape[1]):
            logical = _Index(logical_ids[row, choice])
            if logical < num_logical:
                replica = (fraction * _Index(replica_count[logical])) >> _Index(32)
                physical = logical_to_physical[logical, replica]
                physical_ids[row, choice] = physical
                if record:
                    if _Index(physical) < num_physical:
                        load[_Index(physical)] += 1
                    else:
                        not_counted += 1
            elif logical_ids[row, choice] == -1:
                physical_ids[row, choice] = -1
            else:
                return row * int(logical_ids.shape[1]) + choice
    return ALL_MAPPED if not_counted == 0 else NOT_COUNTED


def warm() -> None:
    """Compile for every combination of integer types that the forward path may bring."""
    one_32, one_64 = np.ones(1, np.int32), np.ones(1, np.int64)
    for ids in (one_32, one_64):
        for count in (one_32, one_64):
            for load in (one_32.copy(), one_64.copy()):
                table = count.reshape(1, 1) - 1
                map_ids(ids.reshape(1, 1) - 1, table, count, load, True, 0, np.empty((1, 1), np.int64))
