"""Compiled parts of survival: one layer's slots changed until every expert stands in two domains.

A *domain* is what is lost together: a rank, or the ranks of a node. `row`: int32 [physical], the logical
expert of each slot, -1 on inactive ranks. `copies`: [logical, domains], replicas of an expert in a domain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel

Ids = NDArray[np.int32]
Floats = NDArray[np.float64]


@kernel
def secure_layers(
    table: Ids, load: Floats, slots_per_rank: int, domain_of_rank: Ids, num_domains: int
) -> None:
    """Change `table` [layers, physical] in place; load: [layers, logical]. A layer that survives stays."""
    for layer in range(len(table)):
        row = table[layer]
        copies = count_copies(row, load.shape[1], slots_per_rank, domain_of_rank, num_domains)
        if is_secure(copies):
            continue
        if not repair(row, load[layer], copies, slots_per_rank, domain_of_rank):
            deal_out(row, load[layer], slots_per_rank, domain_of_rank, num_domains)
            copies = count_copies(row, load.shape[1], slots_per_rank, domain_of_rank, num_domains)
        level(row, load[layer], copies, slots_per_rank, domain_of_rank)


@kernel
def count_copies(
    row: Ids, num_experts: int, slots_per_rank: int, domain_of_rank: Ids, num_domains: int
) -> Ids:
    """[logical, domains]"""
    copies = np.zeros((num_experts, num_domains), np.int32)
    for slot in range(len(row)):
        if row[slot] >= 0:
            copies[row[slot], domain_of_rank[slot // slots_per_rank]] += 1
    return copies


@kernel
def domains_of(copies: Ids, expert: int) -> int:
    """Domains in which an expert stands."""
    found = 0
    for domain in range(copies.shape[1]):
        if copies[expert, domain] > 0:
            found += 1
    return found


@kernel
def is_secure(copies: Ids) -> bool:
    """Whether every expert stands in two domains."""
    insecure = 0
    for expert in range(len(copies)):
        insecure += domains_of(copies, expert) < 2
    return insecure == 0


@kernel
def is_spare(copies: Ids, expert: int, domain: int) -> bool:
    """Whether an expert stands in two domains still when it has a replica less in this one."""
    left = domains_of(copies, expert)
    if copies[expert, domain] == 1:
        left -= 1
    return left >= 2


@kernel
def rank_loads(row: Ids, share: Floats, slots_per_rank: int, num_ranks: int) -> Floats:
    """[ranks]; share: [logical], the load of one replica."""
    loads = np.zeros(num_ranks)
    for slot in range(len(row)):
        if row[slot] >= 0:
            loads[slot // slots_per_rank] += share[row[slot]]
    return loads


@kernel
def on_rank(row: Ids, expert: int, rank: int, slots_per_rank: int) -> bool:
    """Whether a rank holds an expert."""
    found = False
    for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
        found = found or row[slot] == expert
    return found


@kernel
def replicas_of(copies: Ids) -> NDArray[np.int64]:
    """[logical]"""
    count = np.zeros(len(copies), np.int64)
    for expert in range(len(copies)):
        for domain in range(copies.shape[1]):
            count[expert] += copies[expert, domain]
    return count


@kernel
def repair(row: Ids, load: Floats, copies: Ids, slots_per_rank: int, domain_of_rank: Ids) -> bool:
    """Give every expert that stands in one domain a replica in another; False where no way is found."""
    count = replicas_of(copies)
    share = load / np.maximum(count, 1)
    loads = rank_loads(row, share, slots_per_rank, len(domain_of_rank))
    for expert in np.argsort(-load, kind="mergesort"):
        if domains_of(copies, expert) >= 2:
            continue
        slot = cheapest_spare(row, expert, copies, count, load, loads, slots_per_rank, domain_of_rank)
        if slot < 0:
            return False
        give = row[slot]
        domain = domain_of_rank[slot // slots_per_rank]
        row[slot] = expert
        copies[give, domain] -= 1
        copies[expert, domain] += 1
        count[give] -= 1
        count[expert] += 1
        share[give] = load[give] / count[give]
        share[expert] = load[expert] / count[expert]
        loads = rank_loads(row, share, slots_per_rank, len(domain_of_rank))
    return True


@kernel
def cheapest_spare(
    row: Ids,
    expert: int,
    copies: Ids,
    count: NDArray[np.int64],
    load: Floats,
    loads: Floats,
    slots_per_rank: int,
    domain_of_rank: Ids,
) -> int:
    """The slot of a spare replica, in another domain than `expert`'s, whose loss costs least; -1: none.

    Measured by the load of the rank that takes `expert`, and what the other replicas of the spare one get.
    """
    best = -1
    best_cost = np.inf
    for slot in range(len(row)):
        give = row[slot]
        if give < 0 or give == expert:
            continue
        rank = slot // slots_per_rank
        domain = domain_of_rank[rank]
        if copies[expert, domain] > 0 or not is_spare(copies, give, domain):
            continue
        after = loads[rank] - load[give] / count[give] + load[expert] / (count[expert] + 1)
        cost = after + load[give] / (count[give] - 1)
        if cost < best_cost:
            best = slot
            best_cost = cost
    return best


@kernel
def deal_out(row: Ids, load: Floats, slots_per_rank: int, domain_of_rank: Ids, num_domains: int) -> None:
    """Place all anew: two replicas of each expert in the two emptiest domains, then the hottest again.

    The emptiest two always have room where any placement exists, as every expert wants equally many.
    """
    num_experts = len(load)
    room = np.zeros(num_domains, np.int64)
    for rank in range(len(domain_of_rank)):
        if domain_of_rank[rank] >= 0:
            room[domain_of_rank[rank]] += slots_per_rank
    useful = np.minimum(room, num_experts)
    rank_room = np.zeros(len(domain_of_rank), np.int64)
    for rank in range(len(domain_of_rank)):
        rank_room[rank] = slots_per_rank if domain_of_rank[rank] >= 0 else 0
        for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
            row[slot] = -1
    count = np.zeros(num_experts, np.int64)
    for expert in np.argsort(-load, kind="mergesort"):
        first = np.argmax(useful)
        kept = useful[first]
        useful[first] = -1
        second = np.argmax(useful)
        useful[first] = kept - 1
        useful[second] -= 1
        for domain in (first, second):
            put(row, expert, int(domain), rank_room, slots_per_rank, domain_of_rank)
            count[expert] += 1
    left = rank_room.sum()
    while left > 0:
        rank = int(np.argmax(rank_room))
        best = -1
        for expert in range(num_experts):
            better = best < 0 or load[expert] * count[best] > load[best] * count[expert]
            if better and (slots_per_rank >= num_experts or not on_rank(row, expert, rank, slots_per_rank)):
                best = expert
        row[(rank + 1) * slots_per_rank - rank_room[rank]] = best
        rank_room[rank] -= 1
        count[best] += 1
        left -= 1


@kernel
def put(
    row: Ids, expert: int, domain: int, rank_room: NDArray[np.int64], slots_per_rank: int, domain_of_rank: Ids
) -> None:
    """Place an expert on the emptiest rank of a domain."""
    best = -1
    for rank in range(len(domain_of_rank)):
        if domain_of_rank[rank] == domain and (best < 0 or rank_room[rank] > rank_room[best]):
            best = rank
    row[(best + 1) * slots_per_rank - rank_room[best]] = expert
    rank_room[best] -= 1


@kernel
def level(row: Ids, load: Floats, copies: Ids, slots_per_rank: int, domain_of_rank: Ids) -> None:
    """Swap replicas between the hottest rank and others while that cools it and every expert stays secure."""
    num_ranks = len(domain_of_rank)
    share = load / replicas_of(copies)
    loads = rank_loads(row, share, slots_per_rank, num_ranks)
    for _ in range(4 * len(row)):
        hot = np.argmax(loads)
        best = loads[hot] * (1 - 1e-9)
        best_own = -1
        best_other = -1
        for own in range(hot * slots_per_rank, (hot + 1) * slots_per_rank):
            for other in range(len(row)):
                rank = other // slots_per_rank
                if rank == hot or row[other] < 0 or row[other] == row[own]:
                    continue
                gain = share[row[own]] - share[row[other]]
                if gain <= 0:
                    continue
                after = max(loads[hot] - gain, loads[rank] + gain)
                if after < best and may_swap(row, own, other, copies, slots_per_rank, domain_of_rank):
                    best = after
                    best_own = own
                    best_other = other
        if best_own < 0:
            return
        swap(row, best_own, best_other, copies, slots_per_rank, domain_of_rank)
        rank = best_other // slots_per_rank
        gain = share[row[best_other]] - share[row[best_own]]
        loads[hot] -= gain
        loads[rank] += gain


@kernel
def swap(row: Ids, own: int, other: int, copies: Ids, slots_per_rank: int, domain_of_rank: Ids) -> None:
    here = domain_of_rank[own // slots_per_rank]
    there = domain_of_rank[other // slots_per_rank]
    copies[row[own], here] -= 1
    copies[row[own], there] += 1
    copies[row[other], there] -= 1
    copies[row[other], here] += 1
    row[own], row[other] = row[other], row[own]


@kernel
def may_swap(row: Ids, own: int, other: int, copies: Ids, slots_per_rank: int, domain_of_rank: Ids) -> bool:
    """Whether both experts are secure afterwards and neither comes to a rank that holds it."""
    if on_rank(row, row[own], other // slots_per_rank, slots_per_rank):
        return False
    if on_rank(row, row[other], own // slots_per_rank, slots_per_rank):
        return False
    swap(row, own, other, copies, slots_per_rank, domain_of_rank)
    secure = domains_of(copies, row[own]) >= 2 and domains_of(copies, row[other]) >= 2
    swap(row, own, other, copies, slots_per_rank, domain_of_rank)
    return secure
