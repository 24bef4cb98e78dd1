"""From an old and a new expert map to chunks of moves: who copies which expert from where, in which order.

All arrays of a schedule are computed in kernels that release the interpreter lock; the same maps give the
same schedule on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.resized_map import experts_without
from eplb_platform.migration.schedule_kernels import choose_sources, plan_chunks
from eplb_platform.topology import Topology

Ids = NDArray[np.int32]


class ScheduleError(ValueError):
    """There is no way from the one map to the other; the message names the layer, expert or rank."""


@dataclass(frozen=True, eq=False)
class RankMoves:
    """The moves of one chunk at one end, in an order that both ends of a pair share. Arrays are [moves]."""

    layer: Ids
    expert: Ids
    """Logical expert."""
    slot: Ids
    """The slot of this rank, counted from 0 on the rank."""
    peer: Ids
    """The rank at the other end; -1 where the expert is loaded from the checkpoint."""
    peer_slot: Ids
    """The slot of the other rank, counted from 0 there."""
    move: NDArray[np.int64]
    """Which of the chunk's moves it is."""

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, which: NDArray[np.int64]) -> RankMoves:
        return RankMoves(
            self.layer[which],
            self.expert[which],
            self.slot[which],
            self.peer[which],
            self.peer_slot[which],
            self.move[which],
        )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Moves that are staged together and committed at one step.

    All sources are read before the first slot is overwritten, so one slot may be a source and a target.
    """

    layers: tuple[int, ...]
    """Layers whose routing or weights this chunk changes."""
    layer: Ids
    """[moves]"""
    source: Ids
    """[moves], the physical expert that is copied; it may be on the target's rank. -1 where no rank has the
    expert, and its weights are loaded from the model's checkpoint."""
    target: Ids
    """[moves], the physical expert that is overwritten, each at most once per layer."""
    expert: Ids
    """[moves], the logical expert whose weights are copied."""
    map_after: ExpertMap
    """The whole map, every layer, once this chunk is committed."""
    _seen: dict[tuple[int, bool], RankMoves] = field(default_factory=dict, init=False, repr=False)
    """By rank and whether it receives; a rank looks at its moves several times."""

    @property
    def num_moves(self) -> int:
        return len(self.layer)

    @property
    def crosses_ranks(self) -> bool:
        """Whether any expert moves from one rank to another."""
        slots = self.map_after.slots_per_rank
        return bool(((self.source // slots != self.target // slots) & (self.source >= 0)).any())

    def receives_of(self, rank: int) -> RankMoves:
        """What arrives on `rank`, copies within the rank included; the i-th takes row i of its staging."""
        if (rank, True) not in self._seen:
            which = np.flatnonzero(self.target // self.map_after.slots_per_rank == rank)
            self._seen[rank, True] = self._seen_from(self.target[which], self.source[which], which)
        return self._seen[rank, True]

    def sends_of(self, rank: int) -> RankMoves:
        """What `rank` sends to other ranks."""
        if (rank, False) not in self._seen:
            slots = self.map_after.slots_per_rank
            which = np.flatnonzero((self.source // slots == rank) & (self.target // slots != rank))
            self._seen[rank, False] = self._seen_from(self.source[which], self.target[which], which)
        return self._seen[rank, False]

    def _seen_from(self, here: Ids, there: Ids, which: NDArray[np.int64]) -> RankMoves:
        slots = self.map_after.slots_per_rank
        return RankMoves(
            self.layer[which], self.expert[which], here % slots, there // slots, there % slots, which
        )

    def sends_by_rank(self) -> Ids:
        """[ranks], experts that each rank sends to others."""
        slots, num_ranks = self.map_after.slots_per_rank, self.map_after.topology.num_ranks
        senders = self.source // slots
        sent = (senders != self.target // slots) & (senders >= 0)
        return np.bincount(senders[sent], minlength=num_ranks).astype(np.int32)

    def receives_by_rank(self) -> Ids:
        """[ranks], staging rows that each rank needs."""
        slots, num_ranks = self.map_after.slots_per_rank, self.map_after.topology.num_ranks
        return np.bincount(self.target // slots, minlength=num_ranks).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The chunks that lead from one map to another, to be committed in this order."""

    chunks: tuple[Chunk, ...]
    skipped_layers: tuple[int, ...]
    """Layers that stay as they are: the staging is too small for them, and no valid maps lie in between."""

    @property
    def num_moves(self) -> int:
        return sum(chunk.num_moves for chunk in self.chunks)


def build_schedule(
    old: ExpertMap,
    new: ExpertMap,
    *,
    layers_per_chunk: int,
    staging_slots: int,
    order: Sequence[int] | None = None,
) -> Schedule:
    """The chunks of moves that turn `old` into `new`.

    layers_per_chunk: most layers in one chunk. staging_slots: most experts that a rank stages in one chunk; a
    layer that needs more is split over several chunks through valid maps, or skipped. order: the layers,
    first the one to move first; ascending by default.

    Ranks that left (active in `old` only) take no part: a first chunk without moves takes them out of the
    routing of all layers. The slots of ranks that joined are filled before a chunk without moves adds them to
    all layers.

    Raises ScheduleError when the maps do not fit each other or an expert was held by leaving ranks only.
    """
    if layers_per_chunk < 1 or staging_slots < 1:
        raise ValueError(
            f"layers_per_chunk={layers_per_chunk} and staging_slots={staging_slots} must be at least 1"
        )
    _check_same_shape(old, new)
    layers = _check_order(order, old.num_layers)
    staying = sorted(set(old.topology.active_ranks or ()) & set(new.topology.active_ranks or ()))
    joined = sorted(set(new.topology.active_ranks or ()) - set(staying))
    chunks: list[Chunk] = []
    current = old
    if len(staying) < old.topology.num_active_ranks:
        current = _without_left(old, staying)
        chunks.append(_map_change(current))
    if joined:
        filled = _with_joined(current, new, joined)
        loading, _ = _build(current, filled, layers, layers_per_chunk, staging_slots)
        chunks += [*loading, _map_change(filled)]
        current = filled
    moving, skipped = _build(current, new, layers, layers_per_chunk, staging_slots)
    return Schedule((*chunks, *moving), skipped)


def resize_chunks(
    current: ExpertMap,
    target: ExpertMap,
    *,
    living: Sequence[int],
    staying: Sequence[int],
    staging_slots: int,
) -> tuple[Chunk, ...]:
    """The moves from `current` to `target`, as `resized_map` makes it, while no forward pass runs.

    living: the ranks that have what `current` says, those that leave included; experts that none of them has
        are loaded. staying: those of them that are active in `target`.
    A chunk's `map_after` has the topology of `current`, with what changed on ranks that stay: it is what all
    living ranks can go back to. `target` itself is for when all chunks are done.
    """
    slots = current.slots_per_rank
    before = np.where(_slots_of(living, current), current.physical_to_logical, np.int32(-1))
    after = np.array(target.physical_to_logical)
    layer, slot = (indices.astype(np.int32) for indices in np.nonzero((after >= 0) & (after != before)))
    if not len(layer):
        return ()
    order, start = _by_room(slot // slots, staging_slots)
    layer, slot = layer[order], slot[order]
    expert = after[layer, slot]
    held = np.zeros((current.num_layers, current.num_logical_experts + 1), dtype=np.bool_)
    np.put_along_axis(held, before, True, axis=1)  # -1 falls into the last column
    copied = held[layer, expert]
    node_of_rank = np.array(target.topology.node_of_rank, dtype=np.int32)
    source = np.full(len(layer), -1, dtype=np.int32)
    of_copied = np.concatenate([[0], np.cumsum(copied)]).astype(np.int32)[start]
    source[copied] = choose_sources(
        before,
        after,
        layer[copied],
        slot[copied],
        of_copied,
        current.num_logical_experts,
        slots,
        node_of_rank,
    )
    shown = _slots_of(staying, current)
    content = np.array(current.physical_to_logical)
    chunks = []
    for first, last in pairwise(start.tolist()):
        rows = slice(first, last)
        visible = shown[slot[rows]]
        if visible.any():
            content[layer[rows][visible], slot[rows][visible]] = expert[rows][visible]
            current = ExpertMap(content, current.num_logical_experts, current.topology)
        layers = tuple(dict.fromkeys(layer[rows].tolist()))
        chunks.append(Chunk(layers, layer[rows], source[rows], slot[rows], expert[rows], current))
    return tuple(chunks)


def _by_room(rank: Ids, staging_slots: int) -> tuple[NDArray[np.intp], Ids]:
    """An order of moves to `rank` [moves] in which no rank stages more than its room in one chunk.

    Returns the order and where each chunk starts in it, [chunks + 1].
    """
    by_rank = np.argsort(rank, kind="stable")
    first = np.searchsorted(rank[by_rank], rank[by_rank])
    chunk = np.empty(len(rank), dtype=np.int64)
    chunk[by_rank] = (np.arange(len(rank)) - first) // staging_slots
    order = np.argsort(chunk, kind="stable")
    return order, np.searchsorted(chunk[order], np.arange(chunk.max() + 2)).astype(np.int32)


def warm_up() -> None:
    """Compile the kernels, or load them from the cache, so that the first schedule is not late."""
    topology = Topology(num_ranks=2)
    old = ExpertMap(np.array([[0, 1, 2, 3]]), 4, topology)
    new = ExpertMap(np.array([[3, 2, 1, 0]]), 4, topology)
    build_schedule(old, new, layers_per_chunk=1, staging_slots=1)


def _build(
    old: ExpertMap, new: ExpertMap, layers: Ids, layers_per_chunk: int, staging_slots: int
) -> tuple[list[Chunk], tuple[int, ...]]:
    """Chunks between two maps, of which the first may lack ranks that the second has."""
    before, after = np.array(old.physical_to_logical), np.array(new.physical_to_logical)
    slots, num_logical = old.slots_per_rank, old.num_logical_experts
    chunk_of, skipped, num_chunks = plan_chunks(
        before, after, layers, num_logical, slots, layers_per_chunk, staging_slots
    )
    chunk_of = chunk_of[layers]
    position, target = (indices.astype(np.int32) for indices in np.nonzero(chunk_of >= 0))
    chunk = chunk_of[position, target]
    by_chunk = np.argsort(chunk, kind="stable")
    layer, target = layers[position[by_chunk]], target[by_chunk]
    start = np.searchsorted(chunk[by_chunk], np.arange(num_chunks + 1)).astype(np.int32)
    node_of_rank = np.array(new.topology.node_of_rank, dtype=np.int32)
    source = choose_sources(before, after, layer, target, start, num_logical, slots, node_of_rank)
    return _cut(old, new, layer, source, target, start), tuple(np.flatnonzero(skipped).tolist())


def _cut(old: ExpertMap, new: ExpertMap, layer: Ids, source: Ids, target: Ids, start: Ids) -> list[Chunk]:
    """Cut the moves into chunks and put the map after each beside it."""
    # A rank that joins: no map shows its slots before they are filled in every layer.
    loading = old.topology != new.topology
    content = np.array(old.physical_to_logical)
    chunks = []
    for first, last in pairwise(start.tolist()):
        of_layer, of_target = layer[first:last], target[first:last]
        expert = new.physical_to_logical[of_layer, of_target]
        content[of_layer, of_target] = expert
        map_after = old if loading else ExpertMap(content, new.num_logical_experts, new.topology)
        layers = tuple(dict.fromkeys(of_layer.tolist()))
        chunks.append(Chunk(layers, of_layer, source[first:last], of_target, expert, map_after))
    return chunks


def unmoved(layers: Sequence[int], expert_map: ExpertMap) -> Chunk:
    """A chunk of `layers` that changes their routing alone and moves no weights."""
    none = np.empty(0, dtype=np.int32)
    return Chunk(tuple(layers), none, none, none, none, expert_map)


def _map_change(expert_map: ExpertMap) -> Chunk:
    """A chunk of all layers that moves no weights."""
    return unmoved(range(expert_map.num_layers), expert_map)


def _slots_of(ranks: Sequence[int], expert_map: ExpertMap) -> NDArray[np.bool_]:
    """bool [physical], whether a slot is on one of `ranks`."""
    return np.isin(np.arange(expert_map.num_physical_experts) // expert_map.slots_per_rank, ranks)


def _without_left(old: ExpertMap, staying: Sequence[int]) -> ExpertMap:
    """`old` on the ranks that stay."""
    left = sorted(set(old.topology.active_ranks or ()) - set(staying))
    if not staying:
        raise ScheduleError(f"no rank that is active in the old map stays: ranks {left} leave")
    lost = experts_without(old, left)
    if lost:
        layer, expert = lost[0]
        raise ScheduleError(
            f"layer {layer}: logical expert {expert} is only on ranks that leave ({left}): "
            "its weights have to be loaded anew"
        )
    content = np.where(_slots_of(staying, old), old.physical_to_logical, np.int32(-1))
    topology = Topology(old.topology.num_ranks, old.topology.num_nodes, tuple(staying))
    return ExpertMap(content, old.num_logical_experts, topology)


def _with_joined(current: ExpertMap, new: ExpertMap, joined: Sequence[int]) -> ExpertMap:
    """`current`, with what `new` has on the ranks that joined."""
    content = np.where(_slots_of(joined, new), new.physical_to_logical, current.physical_to_logical)
    return ExpertMap(content, new.num_logical_experts, new.topology)


def _check_same_shape(old: ExpertMap, new: ExpertMap) -> None:
    for what, before, after in (
        ("layers", old.num_layers, new.num_layers),
        ("logical experts", old.num_logical_experts, new.num_logical_experts),
        ("physical experts", old.num_physical_experts, new.num_physical_experts),
        ("ranks", old.topology.num_ranks, new.topology.num_ranks),
        ("nodes", old.topology.num_nodes, new.topology.num_nodes),
    ):
        if before != after:
            raise ScheduleError(f"the old map has {before} {what}, the new one {after}: they must agree")


def _check_order(order: Sequence[int] | None, num_layers: int) -> Ids:
    """`order` as an array; every layer must be in it once."""
    if order is None:
        return np.arange(num_layers, dtype=np.int32)
    if sorted(order) != list(range(num_layers)):
        raise ValueError(f"order={list(order)} must name each of the {num_layers} layers once")
    return np.array(order, dtype=np.int32)
