"""Compiled search for the best change: two replicas swapped, or one turned into that of another expert.

A change lowers, summed over windows by their weight, the p-norm over ranks: a maximum that also sees the
ranks right below it. p is a power of two, 2 ** squarings.

Units and arrays as in `adaptive_objective_kernels`.
"""

from __future__ import annotations

import numpy as np

from eplb_platform.algorithms.adaptive_objective_kernels import Flags, Floats, Ids, Ones, Slots
from eplb_platform.jit import kernel

# Neither limit on moves is this large: int64 without a limit.
NO_LIMIT = 1 << 40


@kernel
def power(value: float, squarings: int) -> float:
    """value to the power of 2 ** squarings."""
    for _ in range(squarings):
        value *= value
    return value


@kernel
def best_swap(
    hot: int,
    slots: Slots,
    holds: Flags,
    share: Floats,
    u: Floats,
    powers: Floats,
    factor: Floats,
    slope: Floats,
    slowness: Floats,
    zone: Ids,
    fee: Floats,
    home: Ones,
    pairs: Ids,
    room: int,
    pair_limit: int,
    squarings: int,
    best: float,
) -> tuple[float, int, int, int]:
    """The swap of a replica on rank `hot` with one elsewhere that changes the norm and its fees most.

    factor: [windows], the norm's derivative by the sum of powers; slope: [ranks, windows], by u. The norm is
    convex, so that the tangent is a bound below it: most swaps are ruled out without any power.
    Returns (change, slot of hot, other rank, its slot); rank -1 where none is below `best`.
    """
    num_ranks, num_slots = slots.shape
    num_experts, num_windows = share.shape
    at_hot = np.empty(num_experts)
    for expert in range(num_experts):
        total = 0.0
        for window in range(num_windows):
            total += slope[hot, window] * share[expert, window]
        at_hot[expert] = total
    at_other = np.empty(num_slots)
    found_slot, found_rank, found_other = -1, -1, -1
    for rank in range(num_ranks):
        if rank == hot or zone[rank] != zone[hot]:
            continue
        for slot in range(num_slots):
            total = 0.0
            theirs = slots[rank, slot]
            for window in range(num_windows):
                total += slope[rank, window] * share[theirs, window]
            at_other[slot] = at_hot[theirs] - total + fee[hot, theirs] - fee[rank, theirs]
        for slot in range(num_slots):
            mine = slots[hot, slot]
            if holds[rank, mine]:
                continue
            leaving = fee[rank, mine] - fee[hot, mine] - at_hot[mine]
            for window in range(num_windows):
                leaving += slope[rank, window] * share[mine, window]
            for other in range(num_slots):
                theirs = slots[rank, other]
                if leaving + at_other[other] >= best or holds[hot, theirs]:
                    continue
                moved = home[hot, mine] + home[rank, theirs] - home[rank, mine] - home[hot, theirs]
                if moved > room:
                    continue
                if pair_limit < NO_LIMIT and (
                    not home[hot, mine]
                    or not home[rank, theirs]
                    or pairs[hot, rank] >= pair_limit
                    or pairs[rank, hot] >= pair_limit
                ):
                    continue
                change = fee[rank, mine] - fee[hot, mine] + fee[hot, theirs] - fee[rank, theirs]
                for window in range(num_windows):
                    more = share[theirs, window] - share[mine, window]
                    change += factor[window] * (
                        power(u[hot, window] + more * slowness[hot], squarings)
                        + power(u[rank, window] - more * slowness[rank], squarings)
                        - powers[hot, window]
                        - powers[rank, window]
                    )
                if change < best:
                    best, found_slot, found_rank, found_other = change, slot, rank, other
    return best, found_slot, found_rank, found_other


@kernel
def change_elsewhere(
    expert: int,
    more: float,
    holders: Ids,
    count: Ids,
    load: Floats,
    u: Floats,
    powers: Floats,
    factor: Floats,
    slowness: Floats,
    squarings: int,
    changes: Floats,
) -> float:
    """The change of the norm on the ranks that hold `expert`, when each computes `more` of its load.

    Fills `changes`, one for each of the holders, and returns their sum.
    """
    total = 0.0
    for index in range(count[expert]):
        rank = holders[expert, index]
        change = 0.0
        for window in range(u.shape[1]):
            after = u[rank, window] + more * load[expert, window] * slowness[rank]
            change += factor[window] * (power(after, squarings) - powers[rank, window])
        changes[index] = change
        total += change
    return total


@kernel
def source_of(expert: int, to: int, home: Ones, pairs: Ids) -> int:
    """The rank with `expert` at home that has sent least to rank `to`; -1 where none has it."""
    source = -1
    for rank in range(home.shape[0]):
        if home[rank, expert] and (source < 0 or pairs[rank, to] < pairs[source, to]):
            source = rank
    return source


@kernel
def best_turn(
    hot: int,
    slots: Slots,
    holders: Ids,
    count: Ids,
    holds: Flags,
    load: Floats,
    u: Floats,
    powers: Floats,
    factor: Floats,
    slowness: Floats,
    zone: Ids,
    zone_of: Ids,
    fee: Floats,
    home: Ones,
    pairs: Ids,
    room: int,
    pair_limit: int,
    squarings: int,
    best: float,
) -> tuple[float, int, int, int]:
    """The replica of an expert with several that is best turned into one of another expert.

    Either the replica is on rank `hot`, or the expert that gains one is. What the other holders of both gain
    and lose is added up, which is exact or, where a rank holds both, a bound above (the norm is convex).
    Returns (change, rank, expert that loses, expert that gains); rank -1 where none is below `best`.
    """
    num_ranks = len(slots)
    num_experts, num_windows = load.shape
    found_rank, found_loses, found_gains = -1, -1, -1
    scratch = np.empty(num_ranks)
    gains = np.empty(num_experts)
    wanted = np.empty(num_experts, np.int64)
    num_wanted = 0
    turns_any = False
    for expert in slots[hot]:
        wanted[num_wanted] = expert
        num_wanted += 1
        turns_any |= count[expert] > 1
    num_hot = num_wanted
    if turns_any:
        for expert in range(num_experts):
            if zone_of[expert] == zone[hot] and not holds[hot, expert]:
                wanted[num_wanted] = expert
                num_wanted += 1
    for index in range(num_wanted):
        expert = wanted[index]
        more = 1.0 / (count[expert] + 1) - 1.0 / count[expert]
        gains[expert] = change_elsewhere(
            expert, more, holders, count, load, u, powers, factor, slowness, squarings, scratch
        )
    for loses in range(num_experts):
        if count[loses] < 2 or zone_of[loses] != zone[hot]:
            continue
        more = 1.0 / (count[loses] - 1) - 1.0 / count[loses]
        total = change_elsewhere(
            loses, more, holders, count, load, u, powers, factor, slowness, squarings, scratch
        )
        for place in range(count[loses]):
            rank = holders[loses, place]
            rest = total - scratch[place] - fee[rank, loses]
            at_stake = 0.0
            for window in range(num_windows):
                at_stake += factor[window] * powers[rank, window]
            for index in range(num_hot if rank == hot else 0, num_wanted if rank == hot else num_hot):
                expert = wanted[index]
                change = rest + gains[expert] + fee[rank, expert]
                if change - at_stake >= best or holds[rank, expert]:
                    continue
                if home[rank, loses] - home[rank, expert] > room:
                    continue
                if pair_limit < NO_LIMIT:
                    source = source_of(expert, rank, home, pairs)
                    if source < 0 or not home[rank, loses] or pairs[source, rank] >= pair_limit:
                        continue
                for window in range(num_windows):
                    after = u[rank, window] + slowness[rank] * (
                        load[expert, window] / (count[expert] + 1) - load[loses, window] / count[loses]
                    )
                    change += factor[window] * (power(after, squarings) - powers[rank, window])
                if change < best:
                    best, found_rank, found_loses, found_gains = change, rank, loses, expert
    return best, found_rank, found_loses, found_gains
