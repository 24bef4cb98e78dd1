"""Schedules, executed on tagged weights: every slot must always hold what the map says."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Chunk, Schedule, ScheduleError, build_schedule
from eplb_platform.topology import Topology

Ids = NDArray[np.int32]


def random_map(
    rng: np.random.Generator, num_layers: int, num_logical: int, topology: Topology, slots: int
) -> ExpertMap:
    """Any valid map, replicas on one rank included."""
    rows = np.full((num_layers, topology.num_ranks, slots), -1, dtype=np.int32)
    num_active = topology.num_active_ranks * slots
    for layer in range(num_layers):
        spare = rng.integers(num_logical, size=num_active - num_logical)
        experts = rng.permutation(np.concatenate([np.arange(num_logical), spare]))
        rows[layer, topology.is_active] = experts.reshape(-1, slots)
    return ExpertMap(rows.reshape(num_layers, -1), num_logical, topology)


@st.composite
def rearrangements(draw: st.DrawFn, *, change_ranks: bool = False) -> tuple[ExpertMap, ExpertMap]:
    num_ranks = draw(st.integers(2, 6))
    slots = draw(st.integers(1, 5))
    num_nodes = draw(st.integers(1, min(3, num_ranks)))
    rank_sets = st.sets(st.integers(0, num_ranks - 1), min_size=1)
    everyone = set(range(num_ranks))
    before, after = (draw(rank_sets), draw(rank_sets)) if change_ranks else (everyone, everyone)
    num_logical = draw(st.integers(1, slots * min(len(before), len(after))))
    num_layers = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    old, new = (
        random_map(rng, num_layers, num_logical, Topology(num_ranks, num_nodes, tuple(ranks)), slots)
        for ranks in (before, after)
    )
    if draw(st.booleans()) and not change_ranks:  # a few changes, as a careful algorithm makes them
        keep = rng.random(num_layers) < 0.5
        new = new.replace_layers(np.flatnonzero(keep).tolist(), old)
    return old, new


def execute(old: ExpertMap, chunks: tuple[Chunk, ...]) -> None:
    """Move tagged weights chunk by chunk and compare them with every map on the way."""
    weights = old.physical_to_logical.copy()
    for chunk in chunks:
        staged = weights[chunk.layer, chunk.source]
        np.testing.assert_array_equal(staged, chunk.expert)
        weights[chunk.layer, chunk.target] = staged
        shown = chunk.map_after.physical_to_logical
        np.testing.assert_array_equal(np.where(shown >= 0, weights, -1), shown)


def layers_with_changes(old: ExpertMap, new: ExpertMap) -> set[int]:
    return set(np.flatnonzero((old.physical_to_logical != new.physical_to_logical).any(axis=1)).tolist())


def assert_same(first: Schedule, second: Schedule) -> None:
    assert first.skipped_layers == second.skipped_layers
    assert len(first.chunks) == len(second.chunks)
    for a, b in zip(first.chunks, second.chunks, strict=True):
        assert a.layers == b.layers
        assert a.map_after == b.map_after
        for name in ("layer", "source", "target", "expert"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@given(rearrangements(), st.integers(1, 3), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_every_slot_always_holds_what_the_map_says(
    maps: tuple[ExpertMap, ExpertMap], layers_per_chunk: int, staging_slots: int
) -> None:
    old, new = maps
    schedule = build_schedule(old, new, layers_per_chunk=layers_per_chunk, staging_slots=staging_slots)
    execute(old, schedule.chunks)
    last = schedule.chunks[-1].map_after if schedule.chunks else old
    assert last == new.replace_layers(schedule.skipped_layers, old)
    assert set(schedule.skipped_layers) <= layers_with_changes(old, new)
    if staging_slots >= old.slots_per_rank:
        assert schedule.skipped_layers == ()


@given(rearrangements(), st.integers(1, 3), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_chunks_keep_their_bounds(
    maps: tuple[ExpertMap, ExpertMap], layers_per_chunk: int, staging_slots: int
) -> None:
    old, new = maps
    schedule = build_schedule(old, new, layers_per_chunk=layers_per_chunk, staging_slots=staging_slots)
    before = old
    for chunk in schedule.chunks:
        changed = before.physical_to_logical != chunk.map_after.physical_to_logical
        assert 1 <= len(chunk.layers) <= layers_per_chunk
        assert chunk.receives_by_rank().max() <= staging_slots
        assert set(chunk.layers) == set(np.flatnonzero(changed.any(axis=1)).tolist())
        moved = np.zeros_like(changed)
        moved[chunk.layer, chunk.target] = True
        np.testing.assert_array_equal(moved, changed)  # no slot is written whose expert stays
        assert chunk.num_moves == moved.sum()
        before = chunk.map_after


@given(rearrangements(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_sources_are_as_near_as_they_can_be(maps: tuple[ExpertMap, ExpertMap], layers_per_chunk: int) -> None:
    old, new = maps
    schedule = build_schedule(old, new, layers_per_chunk=layers_per_chunk, staging_slots=100)
    node_of_rank, slots = old.topology.node_of_rank, old.slots_per_rank
    for chunk in schedule.chunks:  # each layer is in one chunk, so the sources are those of the old map
        for layer, source, target, expert in zip(
            chunk.layer, chunk.source, chunk.target, chunk.expert, strict=True
        ):
            holders = np.flatnonzero(old.physical_to_logical[layer] == expert) // slots
            distance = [distance_of(rank, target // slots, node_of_rank) for rank in holders.tolist()]
            assert distance_of(source // slots, target // slots, node_of_rank) == min(distance)


def distance_of(sender: int, receiver: int, node_of_rank: Ids) -> int:
    return 0 if sender == receiver else 1 if node_of_rank[sender] == node_of_rank[receiver] else 2


@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_busiest_sender_sends_as_little_as_possible(seed: int, num_ranks: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    num_logical = int(rng.integers(1, num_ranks * slots + 1))
    old, new = (random_map(rng, 1, num_logical, Topology(num_ranks), slots) for _ in range(2))
    schedule = build_schedule(old, new, layers_per_chunk=1, staging_slots=100)
    if not schedule.chunks:
        return
    choices = []
    for target, expert in zip(schedule.chunks[0].target, schedule.chunks[0].expert, strict=True):
        holders = set((np.flatnonzero(old.physical_to_logical[0] == expert) // slots).tolist())
        if target // slots not in holders:
            choices.append(sorted(holders))
    counts = (np.bincount(c, minlength=num_ranks).max() for c in itertools.product(*choices) if c)
    assert schedule.chunks[0].sends_by_rank().max() == min(counts, default=0)


def test_senders_are_balanced_where_greed_alone_is_not_enough() -> None:
    # Rank 4 wants expert 0 (on ranks 0, 1), then 1 (on 2, 3), then 2 (on 0, 2, which are taken by then).
    before = [[0, 2, 3], [0, 4, 5], [1, 2, 6], [1, 7, 8], [3, 4, 5]]
    old = ExpertMap([np.ravel(before)], 9, Topology(5))
    new = ExpertMap([np.ravel([*before[:4], [0, 1, 2]])], 9, Topology(5))
    (chunk,) = build_schedule(old, new, layers_per_chunk=1, staging_slots=3).chunks
    assert sorted(chunk.sends_by_rank().tolist()) == [0, 0, 1, 1, 1]


def test_a_hot_expert_is_sent_by_all_its_holders() -> None:
    ranks, layers = 8, 4
    before = [[0 if rank < 4 else 1, rank + 2] for rank in range(ranks)]
    after = [[0 if rank >= 4 else 1, rank + 2] for rank in range(ranks)]
    old, new = (ExpertMap([np.ravel(m)] * layers, ranks + 2, Topology(ranks)) for m in (before, after))
    (chunk,) = build_schedule(old, new, layers_per_chunk=layers, staging_slots=layers).chunks
    assert chunk.sends_by_rank().tolist() == [layers] * ranks


@given(rearrangements(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_both_ends_of_a_pair_list_the_same_moves_in_the_same_order(
    maps: tuple[ExpertMap, ExpertMap], layers_per_chunk: int
) -> None:
    old, new = maps
    num_ranks, slots = old.topology.num_ranks, old.slots_per_rank
    schedule = build_schedule(old, new, layers_per_chunk=layers_per_chunk, staging_slots=4)
    for chunk in schedule.chunks:
        assert sum(len(chunk.receives_of(rank)) for rank in range(num_ranks)) == chunk.num_moves
        for receiver, sender in itertools.permutations(range(num_ranks), 2):
            receives, sends = chunk.receives_of(receiver), chunk.sends_of(sender)
            receives = receives[np.flatnonzero(receives.peer == sender)]
            sends = sends[np.flatnonzero(sends.peer == receiver)]
            np.testing.assert_array_equal(receives.layer, sends.layer)
            np.testing.assert_array_equal(receives.expert, sends.expert)
            np.testing.assert_array_equal(receives.slot, sends.peer_slot)
            np.testing.assert_array_equal(receives.peer_slot, sends.slot)
            after = chunk.map_after.physical_to_logical
            np.testing.assert_array_equal(
                after[receives.layer, receiver * slots + receives.slot], receives.expert
            )


@given(rearrangements(), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_same_maps_give_the_same_schedule(
    maps: tuple[ExpertMap, ExpertMap], layers_per_chunk: int, staging_slots: int
) -> None:
    first, second = (
        build_schedule(*maps, layers_per_chunk=layers_per_chunk, staging_slots=staging_slots)
        for _ in range(2)
    )
    assert_same(first, second)


def test_layers_go_in_the_given_order() -> None:
    rng = np.random.default_rng(0)
    old, new = (random_map(rng, 5, 8, Topology(4), 3) for _ in range(2))
    schedule = build_schedule(old, new, layers_per_chunk=2, staging_slots=6, order=[3, 0, 4, 1, 2])
    assert [chunk.layers for chunk in schedule.chunks] == [(3, 0), (4, 1), (2,)]
    assert schedule.chunks[-1].map_after == new


def test_unchanged_layers_do_not_appear() -> None:
    old = ExpertMap.initial(4, 8, Topology(4))
    assert build_schedule(old, old, layers_per_chunk=1, staging_slots=1).chunks == ()


def test_a_layer_that_needs_more_than_the_staging_goes_through_valid_maps() -> None:
    # Without redundancy a rotation of single slots can be cut nowhere, pairwise exchanges can.
    old = ExpertMap([[0, 1, 2, 3, 4, 5]], 6, Topology(2))
    new = ExpertMap([[3, 4, 5, 0, 1, 2]], 6, Topology(2))
    schedule = build_schedule(old, new, layers_per_chunk=1, staging_slots=1)
    assert [chunk.num_moves for chunk in schedule.chunks] == [2, 2, 2]
    execute(old, schedule.chunks)
    assert schedule.chunks[-1].map_after == new


def test_a_layer_that_cannot_be_split_is_skipped_alone() -> None:
    # In layer 0 the experts of slots 0 to 3 rotate over two ranks: each rank must take two at once.
    old = ExpertMap([[0, 1, 2, 3], [0, 1, 2, 3]], 4, Topology(2))
    new = ExpertMap([[3, 2, 0, 1], [2, 1, 0, 3]], 4, Topology(2))
    schedule = build_schedule(old, new, layers_per_chunk=1, staging_slots=1)
    assert schedule.skipped_layers == (0,)
    assert [chunk.layers for chunk in schedule.chunks] == [(1,)]
    assert schedule.chunks[-1].map_after == new.replace_layers([0], old)


def test_redundant_experts_make_a_long_chain_splittable() -> None:
    rng = np.random.default_rng(3)
    topology = Topology(4)
    old, new = (random_map(rng, 6, 12, topology, 6) for _ in range(2))
    schedule = build_schedule(old, new, layers_per_chunk=6, staging_slots=1)
    assert schedule.skipped_layers == ()
    execute(old, schedule.chunks)


@given(rearrangements(change_ranks=True), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_ranks_leave_and_join(
    maps: tuple[ExpertMap, ExpertMap], layers_per_chunk: int, staging_slots: int
) -> None:
    old, new = maps
    staying = old.topology.is_active & new.topology.is_active
    held = old.by_rank()[:, staying].reshape(old.num_layers, -1)
    lost = [layer for layer, row in enumerate(held) if len(set(row.tolist())) < old.num_logical_experts]
    if lost:
        with pytest.raises(ScheduleError, match=rf"layer {lost[0]}: logical expert|no rank .* stays"):
            build_schedule(old, new, layers_per_chunk=layers_per_chunk, staging_slots=staging_slots)
        return
    schedule = build_schedule(old, new, layers_per_chunk=layers_per_chunk, staging_slots=staging_slots)
    execute(old, schedule.chunks)
    last = schedule.chunks[-1].map_after if schedule.chunks else old
    assert last.topology == new.topology
    for layer in set(range(new.num_layers)) - set(schedule.skipped_layers):
        np.testing.assert_array_equal(last.physical_to_logical[layer], new.physical_to_logical[layer])
    left_out = np.flatnonzero(~new.topology.is_active)
    for chunk in schedule.chunks:
        assert not np.isin(chunk.source // old.slots_per_rank, left_out).any()
        assert not np.isin(chunk.target // old.slots_per_rank, left_out).any()
        assert chunk.receives_by_rank().max() <= staging_slots


def test_maps_that_do_not_fit_are_refused() -> None:
    old = ExpertMap.initial(2, 8, Topology(4))
    for other, what in (
        (ExpertMap.initial(3, 8, Topology(4)), "2 layers.* 3"),
        (ExpertMap.initial(2, 4, Topology(4), 4), "8 logical experts.* 4"),
        (ExpertMap.initial(2, 8, Topology(4), 4), "8 physical experts.* 12"),
        (ExpertMap.initial(2, 8, Topology(2)), "4 ranks.* 2"),
        (ExpertMap.initial(2, 8, Topology(4, num_nodes=2)), "1 nodes.* 2"),
    ):
        with pytest.raises(ScheduleError, match=what):
            build_schedule(old, other, layers_per_chunk=1, staging_slots=1)
    with pytest.raises(ValueError, match="staging_slots=0"):
        build_schedule(old, old, layers_per_chunk=1, staging_slots=0)
    with pytest.raises(ValueError, match=r"order=\[0, 0\]"):
        build_schedule(old, old, layers_per_chunk=1, staging_slots=1, order=[0, 0])


UNCOMPILED = """
import numpy as np
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import build_schedule, warm_up
from eplb_platform.topology import Topology
warm_up()
rng = np.random.default_rng(5)
rows = [[rng.permutation(np.r_[np.arange(10), rng.integers(10, size=2)]) for _ in range(3)] for _ in "on"]
old, new = (ExpertMap(row, 10, Topology(4, 2)) for row in rows)
schedule = build_schedule(old, new, layers_per_chunk=2, staging_slots=2)
for chunk in schedule.chunks:
    print(chunk.layers, chunk.source.tolist(), chunk.target.tolist(), chunk.map_after.digest())
print(schedule.skipped_layers)
"""


def test_the_schedule_is_the_same_without_compilation() -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", UNCOMPILED],
            env={**os.environ, "NUMBA_DISABLE_JIT": disabled},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for disabled in ("0", "1")
    ]
    assert printed[0] == printed[1]
    assert printed[0].count("\n") > 2
