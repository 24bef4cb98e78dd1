"""Compiled descent of the adaptive algorithm: the best change of one layer's placement, again and again.

Units and arrays as in `adaptive_objective_kernels`.
"""

from __future__ import annotations

import numpy as np

from eplb_platform.algorithms.adaptive_change_kernels import NO_LIMIT, best_swap, best_turn, power, source_of
from eplb_platform.algorithms.adaptive_objective_kernels import (
    Flags,
    Floats,
    Ids,
    Ones,
    Slots,
    count_replicas,
)
from eplb_platform.jit import kernel

# A change must be worth more than this, in mean rank loads: below lies rounding.
_EPSILON = 1e-9


@kernel
def add_up(rank: int, slots: Slots, share: Floats, slowness: Floats, u: Floats) -> None:
    """Set u[rank] from scratch, so that rounding never piles up."""
    for window in range(u.shape[1]):
        u[rank, window] = 0.0
    for expert in slots[rank]:
        for window in range(u.shape[1]):
            u[rank, window] += share[expert, window] * slowness[rank]


@kernel
def index_of(values: Slots, wanted: int) -> int:
    """The first index of `wanted`, which is there."""
    for index in range(len(values)):
        if values[index] == wanted:
            return index
    return -1


@kernel
def hottest_but(excluded: Flags, heat: Floats) -> int:
    """The first of the ranks with most heat that is not excluded."""
    hottest = -1
    for rank in range(len(heat)):
        if not excluded[rank] and (hottest < 0 or heat[rank] > heat[hottest]):
            hottest = rank
    return hottest


@kernel
def squarings_that_fit(squarings: int, u: Floats) -> int:
    """`squarings`, lowered until powers stay well inside of a float, twice the hottest rank's included."""
    largest = np.log2(2.0 * u.max() + 2.0)
    while squarings > 1 and 2.0**squarings * largest > 900:
        squarings -= 1
    return squarings


@kernel
def descend(
    load: Floats,
    weight: Floats,
    slots: Slots,
    slowness: Floats,
    zone: Ids,
    fee: Floats,
    home: Ones,
    pairs: Ids,
    limit: int,
    pair_limit: int,
    first: int,
    last: int,
    breadth: int,
    max_steps: int,
) -> None:
    """Make the best swap or turn that involves one of the `breadth` hottest ranks until none pays; in place.

    For each number of squarings from `first` to `last`, `max_steps` for each: with a low p the cheap large
    gains come first.

    load: [experts, windows]; weight: [windows]; slots: [ranks, slots], no expert twice on a rank;
    slowness: [ranks], 1 for a rank of mean speed; zone: [ranks], experts stay within theirs;
    fee: [ranks, experts], the price of having the expert on the rank; home: [ranks, experts], where it is in
    the map in use; pairs: [from, to], experts already moved between two ranks, counted on where `pair_limit`
    is below NO_LIMIT; limit: most experts that are not at home.
    """
    num_ranks = len(slots)
    num_experts, num_windows = load.shape
    count = count_replicas(slots, num_experts)
    share = np.empty((num_experts, num_windows))
    holds = np.zeros((num_ranks, num_experts), np.bool_)
    holders = np.empty((num_experts, num_ranks), np.int64)
    zone_of = np.zeros(num_experts, np.int64)
    u = np.empty((num_ranks, num_windows))
    powers = np.empty((num_ranks, num_windows))
    slope = np.empty((num_ranks, num_windows))
    factor = np.empty(num_windows)
    heat = np.empty(num_ranks)
    is_hot = np.empty(num_ranks, np.bool_)
    stale = np.ones(num_ranks, np.bool_)
    for expert in range(num_experts):
        for window in range(num_windows):
            share[expert, window] = load[expert, window] / count[expert]
    count[:] = 0
    moved = 0
    for rank in range(num_ranks):
        for expert in slots[rank]:
            holds[rank, expert] = True
            holders[expert, count[expert]] = rank
            count[expert] += 1
            zone_of[expert] = zone[rank]
            moved += 0 if home[rank, expert] else 1
    aim, steps, squarings = first, 0, 0
    while True:
        for rank in range(num_ranks):
            if stale[rank]:
                add_up(rank, slots, share, slowness, u)
        if steps == 0:
            stale[:] = True
            squarings = squarings_that_fit(aim, u)
        exponent = 2.0**squarings
        for rank in range(num_ranks):
            if stale[rank]:
                for window in range(num_windows):
                    powers[rank, window] = power(u[rank, window], squarings)
                stale[rank] = False
            heat[rank] = 0.0
            is_hot[rank] = False
        for window in range(num_windows):
            total = 0.0
            for rank in range(num_ranks):
                total += powers[rank, window]
            factor[window] = 0.0
            if total > 0:
                factor[window] = weight[window] * total ** (1.0 / exponent - 1.0) / exponent
            for rank in range(num_ranks):
                heat[rank] += factor[window] * powers[rank, window]
                slope[rank, window] = 0.0
                if u[rank, window] > 0:
                    slope[rank, window] = (
                        factor[window] * exponent * powers[rank, window] / u[rank, window] * slowness[rank]
                    )
        best = -_EPSILON
        swap_hot, swap_slot, swap_rank, swap_other = -1, -1, -1, -1
        turn_rank, turn_loses, turn_gains = -1, -1, -1
        room = max(limit - moved, 0)
        for _ in range(min(breadth, num_ranks)):
            hot = hottest_but(is_hot, heat)
            is_hot[hot] = True
            change, slot, rank, other = best_swap(
                hot,
                slots,
                holds,
                share,
                u,
                powers,
                factor,
                slope,
                slowness,
                zone,
                fee,
                home,
                pairs,
                room,
                pair_limit,
                squarings,
                best,
            )
            if rank >= 0:
                best, swap_hot, swap_slot, swap_rank, swap_other = change, hot, slot, rank, other
                turn_rank = -1
            change, rank, loses, gains = best_turn(
                hot,
                slots,
                holders,
                count,
                holds,
                load,
                u,
                powers,
                factor,
                slowness,
                zone,
                zone_of,
                fee,
                home,
                pairs,
                room,
                pair_limit,
                squarings,
                best,
            )
            if rank >= 0:
                best, turn_rank, turn_loses, turn_gains = change, rank, loses, gains
        if turn_rank >= 0:
            if pair_limit < NO_LIMIT:
                pairs[source_of(turn_gains, turn_rank, home, pairs), turn_rank] += 1
            moved += int(home[turn_rank, turn_loses] - home[turn_rank, turn_gains])
            slots[turn_rank, index_of(slots[turn_rank], turn_loses)] = turn_gains
            holds[turn_rank, turn_loses], holds[turn_rank, turn_gains] = False, True
            for index in range(count[turn_loses]):
                stale[holders[turn_loses, index]] = True
                if holders[turn_loses, index] == turn_rank:
                    holders[turn_loses, index] = holders[turn_loses, count[turn_loses] - 1]
            # The last holder may have taken the place of the one that left: it is as stale.
            for index in range(count[turn_loses] - 1):
                stale[holders[turn_loses, index]] = True
            count[turn_loses] -= 1
            holders[turn_gains, count[turn_gains]] = turn_rank
            count[turn_gains] += 1
            for index in range(count[turn_gains]):
                stale[holders[turn_gains, index]] = True
            for window in range(num_windows):
                share[turn_loses, window] = load[turn_loses, window] / count[turn_loses]
                share[turn_gains, window] = load[turn_gains, window] / count[turn_gains]
        elif swap_rank >= 0:
            mine, theirs = slots[swap_hot, swap_slot], slots[swap_rank, swap_other]
            if pair_limit < NO_LIMIT:
                pairs[swap_hot, swap_rank] += 1
                pairs[swap_rank, swap_hot] += 1
            moved += int(home[swap_hot, mine] + home[swap_rank, theirs])
            moved -= int(home[swap_rank, mine] + home[swap_hot, theirs])
            slots[swap_hot, swap_slot], slots[swap_rank, swap_other] = theirs, mine
            holds[swap_hot, mine], holds[swap_hot, theirs] = False, True
            holds[swap_rank, theirs], holds[swap_rank, mine] = False, True
            for index in range(count[mine]):
                if holders[mine, index] == swap_hot:
                    holders[mine, index] = swap_rank
            for index in range(count[theirs]):
                if holders[theirs, index] == swap_rank:
                    holders[theirs, index] = swap_hot
            stale[swap_hot] = stale[swap_rank] = True
        else:
            steps = max_steps
        steps += 1
        if steps >= max_steps:
            if aim >= last:
                return
            aim += 1
            steps = 0
