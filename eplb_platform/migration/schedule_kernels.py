"""The compiled parts of the schedule: they run without the interpreter lock, beside the forward pass.

Every array is C-contiguous and writable; ids are int32. `old` and `new`: [layers, physical], logical expert
of each slot, -1 where a rank is inactive. A *move* is a slot whose expert changes; it is named by its target
slot.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel

Ids = NDArray[np.int32]

UNSPLITTABLE = -1


@kernel
def plan_chunks(
    old: Ids,
    new: Ids,
    order: Ids,
    num_logical: int,
    slots_per_rank: int,
    layers_per_chunk: int,
    staging_slots: int,
) -> tuple[Ids, NDArray[np.bool_], int]:
    """Deal the moves of the layers in `order` out to chunks.

    Returns the chunk of each move [layers, physical] (-1: no move), the skipped layers [layers] and the
    number of chunks. A chunk holds at most `layers_per_chunk` layers, each once, and `staging_slots` arrivals
    per rank.
    """
    num_layers, num_physical = old.shape
    num_ranks = num_physical // slots_per_rank
    chunk_of = np.full((num_layers, num_physical), -1, np.int32)
    skipped = np.zeros(num_layers, np.bool_)
    batch_of = np.empty(num_physical, np.int32)
    used = np.zeros(num_ranks, np.int32)
    arrivals = np.zeros(num_ranks, np.int32)
    chunk = 0
    layers_in_chunk = 0
    for layer in order:
        batches = split_layer(old[layer], new[layer], num_logical, slots_per_rank, staging_slots, batch_of)
        if batches == UNSPLITTABLE:
            skipped[layer] = True
        for batch in range(batches):
            arrivals[:] = 0
            for slot in range(num_physical):
                if batch_of[slot] == batch:
                    arrivals[slot // slots_per_rank] += 1
            full = layers_in_chunk == layers_per_chunk or batch > 0
            for rank in range(num_ranks):
                full = full or used[rank] + arrivals[rank] > staging_slots
            if layers_in_chunk > 0 and full:
                chunk += 1
                layers_in_chunk = 0
                used[:] = 0
            for rank in range(num_ranks):
                used[rank] += arrivals[rank]
            layers_in_chunk += 1
            for slot in range(num_physical):
                if batch_of[slot] == batch:
                    chunk_of[layer, slot] = chunk
    return chunk_of, skipped, chunk + (1 if layers_in_chunk > 0 else 0)


@kernel
def split_layer(
    old: Ids, new: Ids, num_logical: int, slots_per_rank: int, staging_slots: int, batch_of: Ids
) -> int:
    """Split one layer's moves into batches that fit the staging and leave every expert a replica.

    Writes the batch of each move into `batch_of` [physical] (-1: no move). Returns the number of batches, 0
    when nothing moves, `UNSPLITTABLE` when the search finds no way. All moves of a batch happen at once.
    """
    num_physical = len(old)
    room = np.full(num_physical // slots_per_rank, staging_slots, np.int32)
    replicas = np.zeros(num_logical, np.int32)
    pending = 0
    fits = True
    for slot in range(num_physical):
        if old[slot] >= 0:
            replicas[old[slot]] += 1
        batch_of[slot] = -1
        if new[slot] >= 0 and new[slot] != old[slot]:
            batch_of[slot] = 0
            pending += 1
            room[slot // slots_per_rank] -= 1
            fits = fits and room[slot // slots_per_rank] >= 0
    if pending == 0:
        return 0
    if fits:
        return 1

    bring_start, bring = moves_by_arrival(new, batch_of, num_logical)
    for slot in range(num_physical):
        if batch_of[slot] == 0:
            batch_of[slot] = num_physical  # pending
    chain = np.empty(num_physical, np.int32)
    batch = 0
    while pending > 0:
        room[:] = staging_slots
        moved = 0
        moved_before = -1
        # A move that had to wait may be free once a later one has brought its expert elsewhere: sweep again.
        while moved > moved_before:
            moved_before = moved
            for slot in range(num_physical):
                if batch_of[slot] != num_physical:
                    continue
                length = closed_chain(
                    slot, old, new, batch_of, replicas, room, slots_per_rank, bring_start, bring, chain
                )
                for i in range(length):
                    move = chain[i]
                    batch_of[move] = batch
                    room[move // slots_per_rank] -= 1
                    replicas[new[move]] += 1
                    if old[move] >= 0:
                        replicas[old[move]] -= 1
                moved += length
        if moved == 0:
            return UNSPLITTABLE
        pending -= moved
        batch += 1
    return batch


@kernel
def moves_by_arrival(new: Ids, batch_of: Ids, num_logical: int) -> tuple[Ids, Ids]:
    """The moves that bring each expert: those of expert e are bring[start[e]:start[e + 1]], ascending."""
    start = np.zeros(num_logical + 1, np.int32)
    for slot in range(len(new)):
        if batch_of[slot] >= 0:
            start[new[slot] + 1] += 1
    for expert in range(num_logical):
        start[expert + 1] += start[expert]
    bring = np.empty(start[num_logical], np.int32)
    filled = start[:num_logical].copy()
    for slot in range(len(new)):
        if batch_of[slot] >= 0:
            bring[filled[new[slot]]] = slot
            filled[new[slot]] += 1
    return start, bring


@kernel
def closed_chain(
    first: int,
    old: Ids,
    new: Ids,
    batch_of: Ids,
    replicas: Ids,
    room: Ids,
    slots_per_rank: int,
    bring_start: Ids,
    bring: Ids,
    chain: Ids,
) -> int:
    """The shortest chain of pending moves, from `first`, that costs no expert its last replica.

    The move `first` destroys a copy of its slot's old expert x. If that is the last one, another move that
    brings x joins the chain, and so on, until one destroys a copy that is spare, or one of the expert that
    `first` brings. Breadth first over moves; a rank takes no more moves than it has room for. `replicas`
    [logical] and `room` [ranks] count what is in the batch already. Writes `chain`, returns its length or 0.
    """
    pending = len(old)
    parent = np.full(len(old), -2, np.int32)
    queue = np.empty(len(old), np.int32)
    if room[first // slots_per_rank] < 1:
        return 0
    parent[first] = -1
    queue[0] = first
    head = 0
    tail = 1
    while head < tail:
        move = queue[head]
        head += 1
        lost = old[move]
        if lost < 0 or replicas[lost] >= 2 or lost == new[first]:
            length = 0
            while move >= 0:
                chain[length] = move
                length += 1
                move = parent[move]
            return length
        for i in range(bring_start[lost], bring_start[lost + 1]):
            candidate = bring[i]
            if batch_of[candidate] != pending or parent[candidate] != -2:
                continue
            rank = candidate // slots_per_rank
            taken = 0
            ancestor = move
            while ancestor >= 0:
                if ancestor // slots_per_rank == rank:
                    taken += 1
                ancestor = parent[ancestor]
            if taken < room[rank]:
                parent[candidate] = move
                queue[tail] = candidate
                tail += 1
    return 0


@kernel
def choose_sources(
    current: Ids,
    new: Ids,
    layer: Ids,
    target: Ids,
    chunk_start: Ids,
    num_logical: int,
    slots_per_rank: int,
    node_of_rank: Ids,
) -> Ids:
    """The slot that each move copies from: on the same rank, else the same node, else anywhere.

    current: [layers, physical], the map before the first chunk; it is carried forward chunk by chunk.
    layer, target: [moves], ordered by chunk, then grouped by layer. chunk_start: [chunks + 1].
    Among the ranks that may send a move, senders are balanced within the chunk: no other choice has a smaller
    maximum of sends per rank. Raises nothing: every expert is known to have a replica.
    """
    source = np.full(len(layer), -1, np.int32)
    for chunk in range(len(chunk_start) - 1):
        first, last = chunk_start[chunk], chunk_start[chunk + 1]
        start, candidates = list_candidates(
            current, new, layer[first:last], target[first:last], num_logical, slots_per_rank, node_of_rank
        )
        chosen = balance_senders(target[first:last], start, candidates, slots_per_rank, len(node_of_rank))
        for move in range(first, last):
            source[move] = chosen[move - first]
            current[layer[move], target[move]] = new[layer[move], target[move]]
    return source


@kernel
def list_candidates(
    current: Ids, new: Ids, layer: Ids, target: Ids, num_logical: int, slots_per_rank: int, node_of_rank: Ids
) -> tuple[Ids, Ids]:
    """Slots that may serve each move, at most one per rank: candidates[start[m]:start[m + 1]], ascending.

    `candidates` has room for more than it holds.
    """
    num_physical = current.shape[1]
    start = np.zeros(len(layer) + 1, np.int32)
    candidates = np.empty(max(len(layer), 1) * 4, np.int32)
    replica_start = np.zeros(num_logical + 1, np.int32)
    replica = np.empty(num_physical, np.int32)
    listed = -1
    for move in range(len(layer)):
        if layer[move] != listed:
            listed = layer[move]
            list_replicas(current[listed], replica_start, replica)
        expert = new[layer[move], target[move]]
        rank = target[move] // slots_per_rank
        holders = replica[replica_start[expert] : replica_start[expert + 1]]
        distance = 2
        for slot in holders:
            distance = min(distance, distance_between(slot // slots_per_rank, rank, node_of_rank))
        count = start[move]
        if count + len(holders) > len(candidates):
            grown = np.empty(2 * len(candidates) + len(holders), np.int32)
            for i in range(count):
                grown[i] = candidates[i]
            candidates = grown
        before = -1
        for slot in holders:
            sender = slot // slots_per_rank
            if sender != before and distance_between(sender, rank, node_of_rank) == distance:
                candidates[count] = slot
                count += 1
                before = sender
        start[move + 1] = count
    return start, candidates


@kernel
def list_replicas(row: Ids, start: Ids, replica: Ids) -> None:
    """Fill in the slots of each expert of one layer: replica[start[e]:start[e + 1]], ascending."""
    start[:] = 0
    for slot in range(len(row)):
        if row[slot] >= 0:
            start[row[slot] + 1] += 1
    for expert in range(len(start) - 1):
        start[expert + 1] += start[expert]
    filled = start.copy()
    for slot in range(len(row)):
        if row[slot] >= 0:
            replica[filled[row[slot]]] = slot
            filled[row[slot]] += 1


@kernel
def distance_between(sender: int, receiver: int, node_of_rank: Ids) -> int:
    """0 on one rank, 1 within one node, 2 across nodes."""
    if sender == receiver:
        return 0
    return 1 if node_of_rank[sender] == node_of_rank[receiver] else 2


@kernel
def balance_senders(target: Ids, start: Ids, candidates: Ids, slots_per_rank: int, num_ranks: int) -> Ids:
    """Choose one candidate per move so that the busiest sender sends as little as possible.

    First each move, those with the fewest candidates first, takes the least busy sender; then, while a path
    of exchanges leads from the busiest sender to one that is two below it, the moves along it change sender.
    Such a path exists whenever the maximum can be lowered (semi-matching; Harvey, Ladner, Lovász, Tamir
    2003).
    """
    moves = len(target)
    chosen = np.empty(moves, np.int32)
    sends = np.zeros(num_ranks, np.int32)
    for move in by_choice(start, num_ranks):
        best = candidates[start[move]]
        for i in range(start[move] + 1, start[move + 1]):
            if sends[candidates[i] // slots_per_rank] < sends[best // slots_per_rank]:
                best = candidates[i]
        chosen[move] = best
        if best // slots_per_rank != target[move] // slots_per_rank:
            sends[best // slots_per_rank] += 1
    while relieve_busiest(target, start, candidates, slots_per_rank, chosen, sends):
        pass
    return chosen


@kernel
def by_choice(start: Ids, num_ranks: int) -> Ids:
    """The moves, those with the fewest candidates first: a counting sort."""
    moves = len(start) - 1
    filled = np.zeros(num_ranks + 2, np.int32)
    for move in range(moves):
        filled[start[move + 1] - start[move] + 1] += 1
    for choices in range(num_ranks + 1):
        filled[choices + 1] += filled[choices]
    ordered = np.empty(moves, np.int32)
    for move in range(moves):
        choices = start[move + 1] - start[move]
        ordered[filled[choices]] = move
        filled[choices] += 1
    return ordered


@kernel
def relieve_busiest(
    target: Ids, start: Ids, candidates: Ids, slots_per_rank: int, chosen: Ids, sends: Ids
) -> bool:
    """Take one send from the busiest sender along a path of exchanges; False when there is no such path."""
    num_ranks = len(sends)
    busiest = np.argmax(sends)
    first_move = np.full(num_ranks, -1, np.int32)
    next_move = np.empty(len(target), np.int32)
    for move in range(len(target) - 1, -1, -1):
        sender = chosen[move] // slots_per_rank
        if sender != target[move] // slots_per_rank:
            next_move[move] = first_move[sender]
            first_move[sender] = move
    handed_by = np.full(num_ranks, -1, np.int32)  # the move that a rank would take over,
    handed_slot = np.full(num_ranks, -1, np.int32)  # and the slot it would send from
    queue = np.empty(num_ranks, np.int32)
    queue[0] = busiest
    head = 0
    tail = 1
    while head < tail:
        sender = queue[head]
        head += 1
        if sends[sender] <= sends[busiest] - 2:
            sends[sender] += 1
            sends[busiest] -= 1
            while sender != busiest:
                move = handed_by[sender]
                before = chosen[move] // slots_per_rank
                chosen[move] = handed_slot[sender]
                sender = before
            return True
        move = first_move[sender]
        while move >= 0:
            for i in range(start[move], start[move + 1]):
                other = candidates[i] // slots_per_rank
                if other != busiest and handed_by[other] < 0:
                    handed_by[other] = move
                    handed_slot[other] = candidates[i]
                    queue[tail] = other
                    tail += 1
            move = next_move[move]
    return False
