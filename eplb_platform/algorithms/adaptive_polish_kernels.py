"""Compiled kernels that improve a first placement, which costs nothing to change.

Units and arrays as in `adaptive_objective_kernels`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.adaptive_change_kernels import NO_LIMIT
from eplb_platform.algorithms.adaptive_descent_kernels import descend
from eplb_platform.algorithms.adaptive_objective_kernels import (
    Floats,
    Ids,
    Slots,
    copy_slots,
    count_replicas,
    zone_floor,
)
from eplb_platform.jit import kernel


@kernel
def level(load: Floats, slots: Slots, slowness: Floats, zone: Ids, floor: float, max_steps: int) -> float:
    """Swap the hottest rank's replicas, in one window, for those of others until that lowers it no more; in
    place. Ends early where the hottest rank is down to `floor`. Returns its load.

    load: [experts]; slots: [ranks, slots]; slowness, zone: [ranks], as for `descend`.
    """
    num_ranks, num_slots = slots.shape
    num_experts = len(load)
    count = count_replicas(slots, num_experts)
    share = load / count
    holds = np.zeros((num_ranks, num_experts), np.bool_)
    u = np.zeros(num_ranks)
    for rank in range(num_ranks):
        for expert in slots[rank]:
            holds[rank, expert] = True
            u[rank] += share[expert] * slowness[rank]
    for _ in range(max_steps):
        hot = 0
        for rank in range(num_ranks):
            if u[rank] > u[hot]:
                hot = rank
        if u[hot] <= floor:
            break
        best, best_slot, best_rank, best_other = u[hot] * (1 - 1e-6), -1, -1, -1
        for rank in range(num_ranks):
            # Whatever is swapped, one of the two ends at the mean of both or above.
            if zone[rank] != zone[hot] or (u[hot] * slowness[rank] + u[rank] * slowness[hot]) >= best * (
                slowness[rank] + slowness[hot]
            ):
                continue
            for slot in range(num_slots):
                mine = slots[hot, slot]
                if holds[rank, mine]:
                    continue
                for other in range(num_slots):
                    theirs = slots[rank, other]
                    less = share[mine] - share[theirs]
                    hotter = max(u[hot] - less * slowness[hot], u[rank] + less * slowness[rank])
                    if hotter < best and not holds[hot, theirs]:
                        best, best_slot, best_rank, best_other = hotter, slot, rank, other
        if best_rank < 0:
            break
        mine, theirs = slots[hot, best_slot], slots[best_rank, best_other]
        slots[hot, best_slot], slots[best_rank, best_other] = theirs, mine
        holds[hot, mine], holds[hot, theirs] = False, True
        holds[best_rank, theirs], holds[best_rank, mine] = False, True
        for rank in (hot, best_rank):
            u[rank] = 0.0
            for expert in slots[rank]:
                u[rank] += share[expert] * slowness[rank]
    return float(u.max())


@kernel
def random_below(state: Ids, bound: int) -> int:
    """A number from 0 to `bound` - 1 from a generator of our own, the same compiled or not; moves `state`."""
    state[0] = (state[0] * 1103515245 + 12345) % 2147483648
    return int(state[0] // 4096 % bound)


@kernel
def shake(slots: Slots, zone: Ids, zone_of: Ids, changes: int, state: Ids) -> None:
    """Swap random replicas of two ranks, and turn random spare replicas into those of others; in place."""
    num_ranks, num_slots = slots.shape
    count = count_replicas(slots, len(zone_of))
    for _ in range(changes):
        rank, slot = random_below(state, num_ranks), random_below(state, num_slots)
        mine = slots[rank, slot]
        if count[mine] > 1 and random_below(state, 2) == 0:
            expert = random_below(state, len(zone_of))
            if zone_of[expert] == zone[rank] and expert not in slots[rank]:
                slots[rank, slot] = expert
                count[mine] -= 1
                count[expert] += 1
            continue
        other, index = random_below(state, num_ranks), random_below(state, num_slots)
        theirs = slots[other, index]
        if zone[rank] == zone[other] and mine not in slots[other] and theirs not in slots[rank]:
            slots[rank, slot], slots[other, index] = theirs, mine


@kernel
def polish(
    load: Floats,
    weight: Floats,
    slots: Slots,
    slowness: Floats,
    zone: Ids,
    zone_of: Ids,
    squarings: int,
    tolerance: float,
    shakes: int,
) -> None:
    """Improve a placement that costs nothing to change, in place; arguments as of `descend`.

    shakes: random changes to try, each followed by a descent, where one window's hottest rank stays more
    than `tolerance` above what is possible.
    """
    num_ranks, num_slots = slots.shape
    num_experts, num_windows = load.shape
    free = np.zeros((num_ranks, num_experts))
    home = np.zeros((num_ranks, num_experts), np.int8)
    pairs = np.zeros((1, 1), np.int64)
    # Not the constant itself: for numba its type is another.
    no_limit = int(np.int64(NO_LIMIT))
    max_steps = 4 * num_ranks + 4 * num_slots
    # A step looks at slots in proportion to all: so that time stays in proportion too.
    few_steps = max(8, 32768 // (num_ranks * num_slots))
    breadth = 1
    floor, hottest = 0.0, np.inf
    only = load[:, 0].copy()
    if num_windows > 1:
        breadth = max(1, min(num_ranks, 128 // (num_ranks * num_slots)))
        few_steps = max_steps
    else:
        floor = zone_floor(only, slowness, zone, zone_of)
        hottest = level(only, slots, slowness, zone, floor * (1 + tolerance / 2), max_steps)
    trial = slots.copy()
    state = np.ones(1, np.int64)
    for attempt in range(shakes + 1):
        if hottest <= floor * (1 + tolerance * (1 if shakes > 0 else 10)):
            return
        copy_slots(slots, trial)
        if attempt:
            shake(trial, zone, zone_of, 1 + attempt % 6, state)
        descend(
            load,
            weight,
            trial,
            slowness,
            zone,
            free,
            home,
            pairs,
            no_limit,
            no_limit,
            min(4, squarings - 1) if attempt == 0 else 5,
            squarings if num_windows > 1 else 7 if attempt == 0 else 6,
            breadth,
            few_steps,
        )
        if num_windows > 1:
            copy_slots(trial, slots)
            return
        now = level(only, trial, slowness, zone, floor * (1 + tolerance / 2), max_steps)
        if now < hottest * (1 - 1e-9):
            hottest = now
            copy_slots(trial, slots)


@kernel
def level_layers(
    layers: Ids,
    load: NDArray[np.float64],
    slowness: Floats,
    zone: Ids,
    zones_of: Ids,
    tolerance: float,
    other: NDArray[np.int32],
    placed: NDArray[np.int32],
    above: Floats,
) -> None:
    """`level` the other placement of each of `layers`, and take it where its hottest rank is cooler.

    load: [layers, experts, 1 window]; placed, other: [layers, ranks, slots]; zones_of: [layers, experts].
    above: [layers], how far the hottest rank of `placed` is above what is possible.
    """
    for layer in layers:
        only = load[layer, :, 0].copy()
        floor = zone_floor(only, slowness, zone, zones_of[layer])
        max_steps = 4 * (len(zone) + other.shape[2])
        now = level(only, other[layer], slowness, zone, floor * (1 + tolerance / 2), max_steps) / floor - 1
        if now < above[layer] - 1e-9:
            copy_slots(other[layer], placed[layer])
            above[layer] = now


@kernel
def polish_layers(
    layers: Ids,
    load: NDArray[np.float64],
    weight: Floats,
    squarings: Ids,
    slowness: Floats,
    zone: Ids,
    zones_of: Ids,
    tolerance: float,
    shakes: int,
    placed: NDArray[np.int32],
) -> None:
    """`polish` for each of `layers`; arrays as of `repair_layers`."""
    for layer in layers:
        polish(
            load[layer],
            weight[layer],
            placed[layer],
            slowness,
            zone,
            zones_of[layer],
            squarings[layer],
            tolerance,
            shakes,
        )
