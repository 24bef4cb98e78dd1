"""Compiled kernels of the local search: replicas swapped, and replicas turned into those of another expert.

Units: in every window the mean rank takes time 1. `load` [experts, windows] is what one expert adds to the
one rank that holds it alone, `u` [ranks, windows] the time of each rank. The search lowers, summed over
windows by their `weight`, the p-norm over ranks: a maximum that also sees the ranks right below it. p is a
power of two, 2 ** squarings.

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

# Neither limit on moves is this large: int64 without a limit.
NO_LIMIT = 1 << 40

# A change must be worth more than this, in mean rank loads: below lies rounding.
_EPSILON = 1e-9


@kernel
def power(value: float, squarings: int) -> float:
    """value to the power of 2 ** squarings."""
    for _ in range(squarings):
        value *= value
    return value


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
def add_up(rank: int, slots: Slots, share: Floats, slowness: Floats, u: Floats) -> None:
    """Set u[rank] from scratch, so that rounding never piles up."""
    for window in range(u.shape[1]):
        u[rank, window] = 0.0
    for expert in slots[rank]:
        for window in range(u.shape[1]):
            u[rank, window] += share[expert, window] * slowness[rank]


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
