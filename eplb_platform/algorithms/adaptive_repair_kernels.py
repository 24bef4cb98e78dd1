"""Compiled kernels that go from the map in use to a better one, as far as its moves are worth their fees.

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
    Ones,
    Slots,
    copy_slots,
    find_homes,
    hottest_by_window,
    sum_of_fees,
)
from eplb_platform.jit import kernel


@kernel
def adopt(old: Slots, load: Floats, slots: Slots, slowness: Floats, zone: Ids, zone_of: Ids) -> None:
    """Fill `slots` [ranks, slots] from `old` [ranks, slots of the map in use]: what can stay does, no expert
    is twice on a rank or missing, and slots left over go to the experts with the hottest replicas.

    load: [experts]; zone_of: [experts], the only zone where each may be. Needs no more slots on a rank than
    experts in its zone, and no more experts than slots there.
    """
    num_ranks, num_slots = slots.shape
    num_experts = len(load)
    holds = np.zeros((num_ranks, num_experts), np.bool_)
    count = np.zeros(num_experts, np.int64)
    used = np.zeros(num_ranks, np.int64)
    u = np.zeros(num_ranks)
    slots[:] = -1
    for rank in range(num_ranks):
        for expert in old[rank]:
            if expert >= 0 and zone_of[expert] == zone[rank] and not holds[rank, expert]:
                holds[rank, expert] = True
                count[expert] += 1
                used[rank] += 1
    for rank in range(num_ranks):
        while used[rank] > num_slots:
            spare = -1
            for expert in range(num_experts):
                if holds[rank, expert] and (
                    spare < 0
                    or (count[expert] > 1) > (count[spare] > 1)
                    or ((count[expert] > 1) == (count[spare] > 1) and load[expert] < load[spare])
                ):
                    spare = expert
            holds[rank, spare] = False
            count[spare] -= 1
            used[rank] -= 1
        for expert in range(num_experts):
            if holds[rank, expert]:
                u[rank] += load[expert] / count[expert] * slowness[rank]
    while True:
        missing = -1
        for expert in range(num_experts):
            if count[expert] == 0 and (missing < 0 or load[expert] > load[missing]):
                missing = expert
        if missing < 0:
            break
        best = -1
        for rank in range(num_ranks):
            if zone[rank] == zone_of[missing] and used[rank] < num_slots and (best < 0 or u[rank] < u[best]):
                best = rank
        if best < 0:
            spare, hottest = -1, np.inf
            for rank in range(num_ranks):
                for expert in range(num_experts):
                    if zone[rank] == zone_of[missing] and holds[rank, expert] and count[expert] > 1:
                        hotter = max(u[rank], load[expert] / (count[expert] - 1))
                        if hotter < hottest:
                            best, spare, hottest = rank, expert, hotter
            holds[best, spare] = False
            count[spare] -= 1
            used[best] -= 1
            u[best] -= load[spare] / (count[spare] + 1) * slowness[best]
        holds[best, missing] = True
        count[missing] = 1
        used[best] += 1
        u[best] += load[missing] * slowness[best]
    while used.min() < num_slots:
        rank = -1
        for other in range(num_ranks):
            if used[other] < num_slots and (rank < 0 or u[other] < u[rank]):
                rank = other
        best = -1
        for expert in range(num_experts):
            if zone_of[expert] != zone[rank] or holds[rank, expert]:
                continue
            gain = load[expert] / count[expert] - load[best] / count[best] if best >= 0 else np.inf
            if gain > 0 or (gain == 0 and count[expert] < count[best]):
                best = expert
        holds[rank, best] = True
        count[best] += 1
        used[rank] += 1
        u[rank] += load[best] / count[best] * slowness[rank]
    for rank in range(num_ranks):
        for slot in range(min(num_slots, old.shape[1])):
            expert = old[rank, slot]
            if expert >= 0 and holds[rank, expert]:
                slots[rank, slot] = expert
                holds[rank, expert] = False
        slot = 0
        for expert in range(num_experts):
            if holds[rank, expert]:
                while slots[rank, slot] >= 0:
                    slot += 1
                slots[rank, slot] = expert


@kernel
def repair(
    load: Floats,
    raw: Floats,
    weight: Floats,
    slots: Slots,
    home: Ones,
    fees: Floats,
    slowness: Floats,
    zone: Ids,
    squarings: int,
    limit: int,
    pair_limit: int,
) -> tuple[float, int]:
    """Descend from `slots`, in place, with p rising: the cheap large gains come first.

    Returns the objective with fees, on `raw` loads, and how many experts are not at home.
    """
    num_ranks, num_slots = slots.shape
    pairs = np.zeros((num_ranks if pair_limit < NO_LIMIT else 1, num_ranks), np.int64)
    # Few small ranks: looking at more of them costs little.
    breadth = max(1, min(num_ranks, 256 // (num_ranks * num_slots)))
    descend(
        load,
        weight,
        slots,
        slowness,
        zone,
        fees,
        home,
        pairs,
        limit,
        pair_limit,
        min(3, squarings - 1),
        squarings,
        breadth,
        2 * num_ranks * num_slots,
    )
    paid, moved = sum_of_fees(slots, home, fees)
    return (weight * hottest_by_window(raw, slots, slowness)).sum() + paid, moved


@kernel
def gain_above_noise(before: Floats, after: Floats, weight: Floats, paid: float) -> bool:
    """Whether windows [windows] gain more than `paid`, and where they are many more than by chance."""
    num_windows = len(before)
    gain = (weight * (before - after)).sum()
    error = 0.0
    if num_windows >= 8:
        for window in range(num_windows):
            error += (weight[window] * (before[window] - after[window] - gain)) ** 2
    return bool(gain > paid + np.sqrt(error))


@kernel
def repair_layers(
    layers: Ids,
    load: NDArray[np.float64],
    raw: NDArray[np.float64],
    weight: Floats,
    squarings: Ids,
    current: NDArray[np.int32],
    start: NDArray[np.int32],
    from_start: bool,
    slowness: Floats,
    node: Ids,
    zone: Ids,
    zones_of: Ids,
    price: float,
    cross_node: float,
    limits: Ids,
    pair_limit: int,
    placed: NDArray[np.int32],
    cost: Floats,
    moved: Ids,
    stay_cost: Floats,
) -> None:
    """Repair `layers`, from the map in use or, `from_start`, from another that is kept where it costs less.

    load, raw: [layers, experts, windows]; weight: [layers, windows]; current, start: [layers, ranks, slots];
    slowness, node, zone: [ranks]; zones_of: [layers, experts]; limits: [layers].
    Fills for these layers placed [layers, ranks, slots], and [layers]: cost, the objective with fees; moved;
    stay_cost, the cost of staying.
    """
    num_experts = load.shape[1]
    for layer in layers:
        # A smoother norm sees less of what a move gains, but with more noise that is more of a bet.
        seen = max(2.0 ** (squarings[layer] - 8), 2.0 ** (2 - squarings[layer]))
        fee = price / placed[layer].size * min(1.0, seen)
        home, fees = find_homes(current[layer], node, num_experts, fee, cross_node)
        mean = np.zeros(num_experts)
        for expert in range(num_experts):
            mean[expert] = (raw[layer, expert] * weight[layer]).sum()
        old = start[layer] if from_start else current[layer]
        first = np.empty_like(placed[layer])
        adopt(old, mean, first, slowness, zone, zones_of[layer])
        slots = first.copy()
        now, away = repair(
            load[layer],
            raw[layer],
            weight[layer],
            slots,
            home,
            fees,
            slowness,
            zone,
            squarings[layer],
            limits[layer],
            pair_limit,
        )
        before = hottest_by_window(raw[layer], first, slowness)
        paid, forced = sum_of_fees(first, home, fees)
        if from_start:
            if cost[layer] < np.inf and (away > limits[layer] or now >= cost[layer]):
                continue
        else:
            total, _ = sum_of_fees(slots, home, fees)
            after = hottest_by_window(raw[layer], slots, slowness)
            if not gain_above_noise(before, after, weight[layer], total - paid):
                slots, away = first, forced
                now = (weight[layer] * before).sum() + paid
            stay_cost[layer] = (weight[layer] * before).sum() + paid
        copy_slots(slots, placed[layer])
        cost[layer] = now
        moved[layer] = away
