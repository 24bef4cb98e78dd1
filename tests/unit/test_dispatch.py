"""Dispatch tables: even, weighted and local shares of the replicas."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform.balance import rank_load
from eplb_platform.dispatch import (
    even_table,
    local_table,
    replica_shares,
    shared_rank_load,
    table_shares,
    weighted_table,
)
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology
from tests.unit.strategies import expert_maps, loads

MAP = ExpertMap([[0, 1, 2, 0, 2, 0], [0, 1, 2, 1, 2, 0]], 3, Topology(3))


def test_rows_list_the_replicas_and_keep_their_width() -> None:
    table, count = even_table(MAP, 4)
    assert table.tolist() == [
        [[0, 3, 5, -1], [1, -1, -1, -1], [2, 4, -1, -1]],
        [[0, 5, -1, -1], [1, 3, -1, -1], [2, 4, -1, -1]],
    ]
    assert count.tolist() == [[3, 1, 2], [2, 2, 2]]
    assert table.dtype == count.dtype == np.int32


def test_tokens_numbered_modulo_the_count_spread_evenly_over_an_experts_slots() -> None:
    table, count = even_table(MAP, 3)
    tokens = np.arange(60)
    for layer, expert in np.ndindex(2, 3):
        slots = table[layer, expert, tokens % count[layer, expert]]
        assert (MAP.physical_to_logical[layer, slots] == expert).all()
        assert set(np.bincount(slots)) - {0} == {60 // count[layer, expert]}


def test_a_width_that_an_expert_exceeds_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0: expert 0 has 3 replicas"):
        even_table(MAP, 2)


def least_hottest(expert_map: ExpertMap, load: np.ndarray, layer: int) -> float:
    """What no shares can beat: over all sets of ranks, the load that only they hold, by their number."""
    active = expert_map.topology.active_ranks
    held = expert_map.by_rank()[layer]
    holders = [set(np.flatnonzero((held == expert).any(axis=1)).tolist()) for expert in range(load.size)]
    return max(
        sum(float(load[expert]) for expert, ranks in enumerate(holders) if ranks <= set(chosen)) / size
        for size in range(1, len(active) + 1)
        for chosen in combinations(active, size)
    )


@given(st.data())
@settings(max_examples=150)
def test_shares_level_the_ranks_as_far_as_any_shares_can(data: st.DataObject) -> None:
    expert_map = data.draw(expert_maps())
    load = data.draw(loads(expert_map.num_layers, expert_map.num_logical_experts))
    shares = replica_shares(expert_map, load)
    hottest = shared_rank_load(expert_map, load, shares).max(axis=1)
    for layer in range(expert_map.num_layers):
        assert hottest[layer] == pytest.approx(least_hottest(expert_map, load[layer], layer), rel=1e-9)


@given(st.data())
@settings(max_examples=150)
def test_shares_are_parts_of_one_and_no_hotter_rank_could_pass_work_to_a_cooler_one(
    data: st.DataObject,
) -> None:
    expert_map = data.draw(expert_maps())
    load = data.draw(loads(expert_map.num_layers, expert_map.num_logical_experts))
    shares = replica_shares(expert_map, load)
    rank_load = shared_rank_load(expert_map, load, shares)
    assert (shares >= 0).all() and not shares[expert_map.physical_to_logical < 0].any()
    for layer, expert in np.ndindex(load.shape):
        slots = np.flatnonzero(expert_map.physical_to_logical[layer] == expert)
        assert shares[layer, slots].sum() == pytest.approx(1.0)
        ranks = slots // expert_map.slots_per_rank
        if load[layer, expert]:
            giving = rank_load[layer, ranks[shares[layer, slots] > 1e-9]]
            assert giving.max() <= rank_load[layer, ranks].min() + 1e-9 * rank_load[layer].max()


def test_weighted_shares_serve_the_golden_loads_at_their_mean() -> None:
    load = [[600, 560, 120, 120, 20, 10, 10, 10]]
    expert_map = ExpertMap([[5, 0, 6, 0, 7, 0, 4, 1, 2, 1, 3, 1, 0, 1, 1, 0]], 8, Topology(8))
    assert rank_load(expert_map, load).max() > 220
    made = weighted_table(expert_map, load, 256)
    np.testing.assert_allclose(made.exact_rank_load, 181.25, rtol=1e-12)
    assert made.rank_load.max() == pytest.approx(181.25, rel=0.005)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=24))
def test_one_redundant_slot_on_every_rank_serves_any_load_at_its_mean(load: list[int]) -> None:
    expert_map = ExpertMap([alias_placement(load)], len(load), Topology(len(load)))
    level = shared_rank_load(expert_map, [load], replica_shares(expert_map, [load]))
    np.testing.assert_allclose(level, sum(load) / len(load), rtol=1e-9)


def alias_placement(load: list[int]) -> list[int]:
    """Walker's alias method: each rank is filled up by the coldest expert and a part of the hottest."""
    left = [float(tokens) for tokens in load]
    mean, open_experts, placed = sum(load) / len(load), set(range(len(load))), []
    while open_experts:
        coldest = min(open_experts, key=lambda expert: (left[expert], expert))
        hottest = max(open_experts, key=lambda expert: (left[expert], expert))
        left[hottest] -= mean - left[coldest]
        open_experts.remove(coldest)
        placed += [coldest, hottest]
    return placed


def test_windows_are_levelled_by_their_sum() -> None:
    windows = np.arange(18).reshape(3, 2, 3)
    np.testing.assert_array_equal(replica_shares(MAP, windows), replica_shares(MAP, windows.sum(axis=0)))


def test_without_load_every_rank_that_holds_an_expert_takes_the_same() -> None:
    expert_map = ExpertMap([[0, 1, 0, 0]], 2, Topology(2))
    assert replica_shares(expert_map, [[0, 0]]).tolist() == [[0.5, 1.0, 0.5, 0.0]]


@given(st.data())
@settings(max_examples=100)
def test_a_weighted_table_lists_replicas_alone_and_says_what_it_attains(data: st.DataObject) -> None:
    expert_map = data.draw(expert_maps())
    load = data.draw(loads(expert_map.num_layers, expert_map.num_logical_experts))
    width = data.draw(st.integers(int(expert_map.replica_count.max()), 40))
    made = weighted_table(expert_map, load, width)
    assert made.logical_to_physical.shape == (*load.shape, width)
    for layer, expert in np.ndindex(load.shape):
        length = made.count[layer, expert]
        row, rest = np.split(made.logical_to_physical[layer, expert], [length])
        assert 1 <= length <= width and (rest == -1).all()
        assert (expert_map.physical_to_logical[layer, row] == expert).all()
    np.testing.assert_allclose(
        made.rank_load, shared_rank_load(expert_map, load, made.realised_shares), rtol=1e-9
    )
    assert (made.rounding_loss >= -1e-9).all()
    # Each expert with replicas is off by less than the load of an entry for each of them.
    hot = np.where(expert_map.replica_count > 1, load, 0).max(axis=1) * expert_map.replica_count.max()
    length = max(1, width - 31)
    excess = made.rank_load.max(axis=1) - made.exact_rank_load.max(axis=1)
    assert (excess <= hot * expert_map.slots_per_rank / length + 1e-9 * load.max(initial=0)).all()


def test_wide_tables_lose_next_to_nothing() -> None:
    rng = np.random.default_rng(1)
    load = rng.lognormal(size=(4, 32)) * 1e6
    expert_map = ExpertMap.round_robin(4, 32, Topology(8), 32)
    losses = [weighted_table(expert_map, load, width).rounding_loss.max() for width in (4, 64, 1024)]
    assert losses[2] < 1e-3 and losses[2] <= losses[1] <= losses[0]


def test_shares_that_a_row_can_hold_are_held_exactly() -> None:
    expert_map = ExpertMap([[0, 0, 0, 1]], 2, Topology(4))
    made = weighted_table(expert_map, [[9, 1]], 64)
    assert made.count.tolist() == [[3, 1]]
    assert made.logical_to_physical[0, 0, :3].tolist() == [0, 1, 2]
    assert made.rounding_loss.tolist() == [0.0]


def test_entries_of_a_replica_lie_apart() -> None:
    # The ranks hold 0, 4 and 8 of others, and expert 0 fills them up to 10: shares of 10, 6 and 2 of 18.
    expert_map = ExpertMap([[0, 3, 0, 1, 0, 2]], 4, Topology(3))
    made = weighted_table(expert_map, [[18, 4, 8, 0]], 9)
    row = made.logical_to_physical[0, 0]
    assert np.bincount(row).tolist() == [5, 0, 3, 0, 1]
    for slot, entries in ((0, 5), (2, 3), (4, 1)):
        due = np.arange(1, 10) * entries / 9
        assert np.abs(np.cumsum(row == slot) - due).max() < 1


@pytest.mark.parametrize("load", [[[1, 2]], [[1.0, np.nan, 1.0]] * 2, [[1, -1, 0]] * 2])
def test_load_that_cannot_be_shared_is_refused(load: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        weighted_table(MAP, load, 4)


def test_a_weighted_table_too_narrow_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0: expert 0 has 3 replicas"):
        weighted_table(MAP, np.ones((2, 3)), 2)


def test_tokens_stay_on_their_rank_then_on_their_node() -> None:
    # Nodes {0, 1} and {2, 3}; expert 0 everywhere but on rank 3, expert 1 on node 1, expert 2 on node 0.
    expert_map = ExpertMap([[0, 2, 0, 2, 0, 1, 1, 3]], 4, Topology(4, 2))
    rows = {}
    for rank in range(4):
        table, count = local_table(expert_map, 3, rank)
        rows[rank] = [set(row[:length].tolist()) for row, length in zip(table[0], count[0], strict=True)]
        assert all((row[length:] == -1).all() for row, length in zip(table[0], count[0], strict=True))
    assert rows[0] == [{0}, {5, 6}, {1}, {7}]
    assert rows[1] == [{2}, {5, 6}, {3}, {7}]
    assert rows[2] == [{4}, {5}, {1, 3}, {7}]
    assert rows[3] == [{4}, {6}, {1, 3}, {7}]


def test_ranks_without_a_replica_nearby_begin_with_different_ones() -> None:
    expert_map = ExpertMap([[0, 0, 1, 2]], 3, Topology(4, 2))
    firsts = {int(local_table(expert_map, 2, rank)[0][0, 0, 0]) for rank in (2, 3)}
    assert firsts == {0, 1}


def test_local_tables_avoid_inactive_ranks_and_have_none_for_them() -> None:
    expert_map = ExpertMap([[0, 1, -1, -1, 1, 0]], 2, Topology(3, 1, (0, 2)))
    table, count = local_table(expert_map, 2, 2)
    assert table.tolist() == [[[5, -1], [4, -1]]] and count.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="rank is 1"):
        local_table(expert_map, 2, 1)


def test_shares_of_even_tables_are_even() -> None:
    shares = table_shares(MAP, *even_table(MAP, 5))
    np.testing.assert_allclose(shares[0], [1 / 3, 1, 1 / 2, 1 / 3, 1 / 2, 1 / 3])
    load = np.arange(6).reshape(2, 3)
    np.testing.assert_allclose(shared_rank_load(MAP, load, shares), rank_load(MAP, load))
