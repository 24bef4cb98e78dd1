"""Compiled kernels of what the adaptive algorithm lowers: the hottest rank over windows, and fees for moves.

Units, in all of the adaptive algorithm's kernels: in every window the mean rank takes time 1. `load`
[experts, windows] is what one expert adds to the one rank that holds it alone, `u` [ranks, windows] the time
of each rank.

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
# Flags that are counted with: 0 or 1.
Ones = NDArray[np.int8]


@kernel
def copy_slots(source: Slots, target: Slots) -> None:
    """Assigning a slice would do too, and compile for seconds."""
    for rank in range(source.shape[0]):
        for slot in range(source.shape[1]):
            target[rank, slot] = source[rank, slot]


@kernel
def count_replicas(slots: Slots, num_experts: int) -> Ids:
    """[experts], from the slots of one layer [ranks, slots]; -1 counts for nothing."""
    count = np.zeros(num_experts, np.int64)
    for rank in range(slots.shape[0]):
        for expert in slots[rank]:
            if expert >= 0:
                count[expert] += 1
    return count


@kernel
def hottest_by_window(load: Floats, slots: Slots, slowness: Floats) -> Floats:
    """[windows], the time of the hottest rank; load: [experts, windows]; slots: [ranks, slots]."""
    num_experts, num_windows = load.shape
    count = count_replicas(slots, num_experts)
    hottest = np.zeros(num_windows)
    u = np.empty(num_windows)
    for rank in range(slots.shape[0]):
        u[:] = 0.0
        for expert in slots[rank]:
            if expert >= 0:
                for window in range(num_windows):
                    u[window] += load[expert, window] / count[expert] * slowness[rank]
        for window in range(num_windows):
            hottest[window] = max(hottest[window], u[window])
    return hottest


@kernel
def zone_floor(load: Floats, slowness: Floats, zone: Ids, zone_of: Ids) -> float:
    """The mean of the hottest zone, below which no hottest rank can be; one window, load: [experts]."""
    tokens = np.zeros(zone.max() + 1)
    speed = np.zeros(zone.max() + 1)
    for expert in range(len(load)):
        tokens[zone_of[expert]] += load[expert]
    for rank in range(len(zone)):
        speed[zone[rank]] += 1.0 / slowness[rank]
    return float((tokens / speed).max())


@kernel
def find_homes(
    current: Slots, node: Ids, num_experts: int, fee: float, cross_node: float
) -> tuple[Ones, Floats]:
    """Where each expert is in the map in use, and the fee for having it on a rank: both [ranks, experts].

    No fee where it is, `fee` where another rank of the node has it, `cross_node` times that elsewhere.
    """
    num_ranks = len(current)
    home = np.zeros((num_ranks, num_experts), np.int8)
    on_node = np.zeros((node.max() + 1, num_experts), np.bool_)
    for rank in range(num_ranks):
        for expert in current[rank]:
            if expert >= 0:
                home[rank, expert] = 1
                on_node[node[rank], expert] = True
    fees = np.empty((num_ranks, num_experts))
    for rank in range(num_ranks):
        for expert in range(num_experts):
            fees[rank, expert] = 0.0
            if not home[rank, expert]:
                fees[rank, expert] = fee if on_node[node[rank], expert] else fee * cross_node
    return home, fees


@kernel
def sum_of_fees(slots: Slots, home: Ones, fees: Floats) -> tuple[float, int]:
    """The fees of a placement [ranks, slots], and how many experts are not at home."""
    total, moved = 0.0, 0
    for rank in range(len(slots)):
        for expert in slots[rank]:
            total += fees[rank, expert]
            moved += 0 if home[rank, expert] else 1
    return total, moved
