"""Compiled kernels of the tables that tokens are dispatched by: rows of slots, one for each expert.

Arrays as in `dispatch_share_kernels`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.dispatch_share_kernels import replicas_by_expert
from eplb_platform.jit import kernel

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Slots = NDArray[np.int32]

# Lengths of a row that are tried, counted from its width downwards.
_TRIED_LENGTHS = 32


@kernel
def level_ranks(load: float, elsewhere: Floats, shares: Floats) -> None:
    """Fill shares, [replicas]: those of one expert that bring its ranks to one level, but none below 0.

    load: of the expert, above 0; elsewhere: [replicas], what their ranks compute of other experts.
    """
    level, num_below, num_before = np.inf, shares.size, shares.size + 1
    # Fewer ranks each time; rounding might bring some back.
    while 0 < num_below < num_before:
        num_before, num_below, total = num_below, 0, load
        for base in elsewhere:
            if base < level:
                total += base
                num_below += 1
        if num_below:
            level = total / num_below
    filled = 0.0
    for replica in range(shares.size):
        shares[replica] = max(0.0, level - elsewhere[replica])
        filled += shares[replica]
    for replica in range(shares.size):
        # Divided by their own sum: a load that is small beside the others' leaves few digits.
        shares[replica] = shares[replica] / filled if filled > 0.0 else 1.0 / shares.size


@kernel
def row_length(shares: Floats, most: int) -> int:
    """The length of a row, at most `most`, whose entries come nearest to `shares`: of equals the longest."""
    best, best_error = most, np.inf
    for length in range(most, max(shares.size, most - _TRIED_LENGTHS + 1) - 1, -1):
        error = 0.0
        for share in shares:
            error += abs(share * length - np.rint(share * length))
        if error / length < best_error - 1e-9:
            best, best_error = length, error / length
    return best


@kernel
def count_entries(shares: Floats, load: float, length: int, elsewhere: Floats, entries: Ids) -> int:
    """Fill entries, [replicas]: how many of a row's `length` entries each replica gets; returns their number
    without the common divisor. What rounding down leaves goes to the ranks that are coolest by then.

    elsewhere: see `level_ranks`.
    """
    left = length
    for replica in range(shares.size):
        # A hair more, so that 3 * (1 / 3) is 1 and not 0.
        entries[replica] = int(np.floor(shares[replica] * length + 1e-9))
        left -= entries[replica]
    for _ in range(left):
        coolest, lowest = 0, np.inf
        for replica in range(shares.size):
            rank_load = elsewhere[replica] + entries[replica] * load / length
            if rank_load < lowest:
                coolest, lowest = replica, rank_load
        entries[coolest] += 1
    divisor = 0
    for count in entries:
        one, other = divisor, count
        while other:
            one, other = other, one % other
        divisor = one
    for replica in range(shares.size):
        entries[replica] //= divisor
    return length // divisor


@kernel
def interleave(entries: Ids, slots: Ids, row: Slots) -> None:
    """Fill `row` so that each slot comes `entries` times, spread as evenly as can be (smooth weighted round
    robin): at each place the slot that is furthest behind its due, the first of equals.
    """
    due = np.zeros(entries.size, np.int64)
    for place in range(row.size):
        furthest = 0
        for replica in range(entries.size):
            due[replica] += entries[replica]
            if due[replica] > due[furthest]:
                furthest = replica
        due[furthest] -= row.size
        row[place] = slots[furthest]


@kernel
def fill_row(load: float, slots: Ids, num_slots: int, shares: Floats, rank_load: Floats, row: Slots) -> int:
    """Fill the row of one expert and return the entries in use; rank_load follows from exact to realised.

    slots: of its replicas; num_slots: of a rank; shares: [slots] of the layer, exact; rank_load: [ranks];
    row: [width] of -1.
    """
    holders = np.empty(slots.size, np.int64)
    num_holders = 0
    for index in range(slots.size):
        if index == 0 or slots[index] // num_slots != slots[index - 1] // num_slots:
            holders[num_holders] = slots[index]
            num_holders += 1
    holders = holders[:num_holders]
    parts = shares[holders]
    elsewhere = rank_load[holders // num_slots] - parts * load
    if load > 0.0:
        # Not the exact shares: these make good what the rounding of hotter experts left on the ranks.
        level_ranks(load, elsewhere, parts)
    entries = np.empty(num_holders, np.int64)
    length = count_entries(parts, load, row_length(parts, row.size), elsewhere, entries)
    for index in range(num_holders):
        rank_load[holders[index] // num_slots] = elsewhere[index] + entries[index] * load / length
    interleave(entries, holders, row[:length])
    return length


@kernel
def fill_tables(
    shares: Floats, load: Floats, experts: Slots, order: Ids, num_ranks: int, table: Slots, count: Slots
) -> None:
    """Fill table, [layers, experts, width] of -1, and count, [layers, experts]: its rows and their lengths.

    shares, experts: [layers, slots]; load: [layers, experts]; order: [layers, experts], hottest first, so
    that the finer steps of cooler experts make good what those of hotter ones leave.
    """
    num_layers, num_experts, _ = table.shape
    num_slots = experts.shape[1] // num_ranks
    first = np.empty(num_experts + 1, np.int64)
    replicas = np.empty(experts.shape[1], np.int64)
    for layer in range(num_layers):
        replicas_by_expert(experts[layer], first, replicas)
        rank_load = np.zeros(num_ranks, np.float64)
        for slot in replicas[: first[num_experts]]:
            rank_load[slot // num_slots] += shares[layer, slot] * load[layer, experts[layer, slot]]
        for expert in order[layer]:
            slots = replicas[first[expert] : first[expert + 1]]
            if slots.size == 1:
                table[layer, expert, 0] = slots[0]
                count[layer, expert] = 1
            else:
                count[layer, expert] = fill_row(
                    load[layer, expert], slots, num_slots, shares[layer], rank_load, table[layer, expert]
                )


@kernel
def count_shares(table: Slots, count: Slots, experts: Slots) -> Floats:
    """[layers, slots], the part of its expert's tokens that each slot takes by a table.

    table: [layers, experts, width]; count: [layers, experts], entries in use; experts: [layers, slots].
    """
    shares = np.zeros(experts.shape, np.float64)
    for layer in range(table.shape[0]):
        for expert in range(table.shape[1]):
            for slot in table[layer, expert, : count[layer, expert]]:
                shares[layer, slot] += 1.0
        for slot in range(experts.shape[1]):
            if experts[layer, slot] >= 0:
                shares[layer, slot] /= count[layer, experts[layer, slot]]
    return shares


@kernel
def nearness(slot: int, num_slots: int, rank: int, node_of_rank: Slots) -> int:
    """2 for a slot on `rank`, 1 for one on its node, 0 for others; num_slots: of a rank."""
    other = slot // num_slots
    if other == rank:
        return 2
    return 1 if node_of_rank[other] == node_of_rank[rank] else 0


@kernel
def fill_local_table(experts: Slots, rank: int, node_of_rank: Slots, table: Slots, count: Slots) -> None:
    """Fill table, [layers, experts, width] of -1, and count, [layers, experts], for tokens of `rank`: the
    replicas on it, else those on its node, else all, beginning with another one on every rank.

    experts: [layers, slots], -1 on inactive ranks.
    """
    num_layers, num_experts, _ = table.shape
    num_slots = experts.shape[1] // node_of_rank.size
    first = np.empty(num_experts + 1, np.int64)
    replicas = np.empty(experts.shape[1], np.int64)
    for layer in range(num_layers):
        replicas_by_expert(experts[layer], first, replicas)
        for expert in range(num_experts):
            nearest, here = 0, 0
            for slot in replicas[first[expert] : first[expert + 1]]:
                near = nearness(slot, num_slots, rank, node_of_rank)
                if near > nearest:
                    nearest, here = near, 0
                here += near == nearest
            place = here - rank % here
            for slot in replicas[first[expert] : first[expert + 1]]:
                if nearness(slot, num_slots, rank, node_of_rank) == nearest:
                    table[layer, expert, place % here] = slot
                    place += 1
            count[layer, expert] = here
