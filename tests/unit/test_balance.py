from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform import ExpertMap, Topology
from eplb_platform.balance import (
    balancedness,
    imbalance_ratio,
    lower_bound,
    moved_experts,
    rank_load,
    window_balancedness,
)
from tests.unit.strategies import expert_maps, loads, topologies

GOLDEN = np.array([[600, 560, 120, 120, 20, 10, 10, 10]])


@given(expert_maps(), st.data())
def test_rank_load_is_each_rank_s_share(expert_map: ExpertMap, data: st.DataObject) -> None:
    shape = (expert_map.num_layers, expert_map.num_logical_experts)
    load = data.draw(loads(2, *shape))
    expected = np.zeros((2, expert_map.num_layers, expert_map.topology.num_ranks))
    for layer, ranks in enumerate(expert_map.by_rank().tolist()):
        for rank, held in enumerate(ranks):
            for expert in held:
                if expert >= 0:
                    expected[:, layer, rank] += (
                        load[:, layer, expert] / expert_map.replica_count[layer, expert]
                    )
    np.testing.assert_allclose(rank_load(expert_map, load), expected, rtol=1e-12)
    np.testing.assert_allclose(rank_load(expert_map, load[0]), expected[0], rtol=1e-12)


def test_measures_of_one_layer() -> None:
    load = rank_load(ExpertMap([[0, 1, 2, 0]], 3, Topology(2)), [[60, 10, 30]])
    assert load.tolist() == [[40, 60]]
    assert balancedness(load).tolist() == [50 / 60]
    assert imbalance_ratio(load).tolist() == [(60 - 50) / 50]


def test_a_layer_without_load_is_balanced() -> None:
    assert balancedness(np.zeros((3, 2, 4))).tolist() == [[1, 1]] * 3
    assert imbalance_ratio(np.zeros((2, 4))).tolist() == [0, 0]
    expert_map = ExpertMap.initial(2, 4, Topology(2))
    assert window_balancedness(expert_map, np.zeros((3, 2, 4))).tolist() == [1, 1]
    assert window_balancedness(expert_map, np.zeros((0, 2, 4))).tolist() == [1, 1]
    assert lower_bound(np.zeros((3, 2, 4)), 4, Topology(2)).tolist() == [1, 1]


def test_inactive_ranks_are_left_out_of_the_mean() -> None:
    topology = Topology(3, active_ranks=(0, 2))
    expert_map = ExpertMap([[0, -1, 1]], 2, topology)
    load = rank_load(expert_map, [[30, 10]])
    assert load.tolist() == [[30, 0, 10]]
    assert balancedness(load, topology).tolist() == [20 / 30]
    assert imbalance_ratio(load, topology).tolist() == [0.5]
    assert window_balancedness(expert_map, [[30, 10]]).tolist() == [20 / 30]
    with pytest.raises(ValueError, match="rank load has 2 ranks, expected 3"):
        balancedness(load[:, :2], topology)


def test_windows_do_not_cancel_out() -> None:
    expert_map = ExpertMap.initial(1, 2, Topology(2))
    alternating = [[[10, 0]], [[0, 10]]]
    assert window_balancedness(expert_map, alternating).tolist() == [0.5]
    assert window_balancedness(expert_map, np.sum(alternating, axis=0)).tolist() == [1.0]


@given(expert_maps(), st.data())
def test_balancedness_is_at_most_one_and_at_least_one_over_the_ranks(
    expert_map: ExpertMap, data: st.DataObject
) -> None:
    load = data.draw(loads(3, expert_map.num_layers, expert_map.num_logical_experts))
    topology = expert_map.topology
    for measured in (
        balancedness(rank_load(expert_map, load), topology),
        window_balancedness(expert_map, load),
    ):
        assert (measured <= 1).all()
        assert (measured >= 1 / topology.num_active_ranks - 1e-12).all()


def test_load_of_another_model_is_refused() -> None:
    expert_map = ExpertMap.initial(2, 4, Topology(2))
    with pytest.raises(ValueError, match=r"load has shape \[2, 5\], expected \[\.\.\., 2, 4\]"):
        rank_load(expert_map, np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"load has shape \[4\], expected \[layers, logical\] or \[windows"):
        window_balancedness(expert_map, np.zeros(4))


@given(st.data())
def test_moved_experts_are_those_that_a_rank_must_receive(data: st.DataObject) -> None:
    old = data.draw(expert_maps())
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    active = np.repeat(old.topology.is_active, old.slots_per_rank)
    table = old.physical_to_logical.copy()
    for row in table:
        row[active] = rng.permutation(row[active])
    new = ExpertMap(table, old.num_logical_experts, old.topology)
    expected = [
        sum(len(set(to) - set(held)) for held, to in zip(before, after, strict=True))
        for before, after in zip(old.by_rank().tolist(), new.by_rank().tolist(), strict=True)
    ]
    assert moved_experts(old, new).tolist() == expected
    assert not moved_experts(old, old).any()


def test_moved_experts_of_maps_that_differ_in_shape() -> None:
    old = ExpertMap.initial(1, 4, Topology(2))
    assert moved_experts(old, ExpertMap.initial(1, 4, Topology(2), 2)).tolist() == [3]
    with pytest.raises(ValueError, match=r"differ in \[layers, logical experts, ranks\]"):
        moved_experts(old, ExpertMap.initial(1, 4, Topology(4)))


def test_lower_bounds_that_are_known() -> None:
    mean = GOLDEN.sum() / 4
    # Hottest and coldest of two slots, no redundancy.
    np.testing.assert_allclose(lower_bound(GOLDEN, 8, Topology(4)), 610 / mean)
    # Two redundant slots: both halve the two hottest experts.
    np.testing.assert_allclose(lower_bound(GOLDEN, 10, Topology(2)), 1.0)
    np.testing.assert_allclose(lower_bound([[100, 90, 1, 1, 1, 1]], 8, Topology(4)), 50 / (194 / 4))
    # With a redundant slot for each rank there is always a way to keep every replica below the mean.
    assert lower_bound(GOLDEN, 16, Topology(8)).tolist() == [1.0]
    # Three experts that are equally hot on two ranks: two of them meet.
    np.testing.assert_allclose(lower_bound([[10, 10, 10, 0]], 4, Topology(2)), 20 / 15)


def test_lower_bound_of_windows_is_above_that_of_their_sum() -> None:
    alternating = [[[10, 0, 0, 0]], [[0, 0, 0, 10]]]
    np.testing.assert_allclose(lower_bound(alternating, 4, Topology(2)), 2.0)
    np.testing.assert_allclose(lower_bound(np.sum(alternating, axis=0), 4, Topology(2)), 1.0)


@pytest.mark.parametrize("physical", [3, 6, 5])
def test_slots_that_cannot_hold_the_experts_are_refused(physical: int) -> None:
    topology = Topology(4, active_ranks=(0, 1))
    with pytest.raises(ValueError, match=f"{physical} physical experts on 4 ranks .* cannot hold 4 logical"):
        lower_bound(np.ones((1, 4)), physical, topology)


@cache
def _every_map(num_experts: int, num_ranks: int, slots: int) -> ExpertMap:
    """All placements that there are, each as a layer of its own."""
    tables = np.array(list(itertools.product(range(num_experts), repeat=num_ranks * slots)))
    held = (tables[:, :, None] == np.arange(num_experts)).any(axis=1).all(axis=1)
    return ExpertMap(tables[held], num_experts, Topology(num_ranks))


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(
        [(2, 2, 1), (3, 2, 2), (4, 2, 2), (2, 2, 2), (3, 3, 1), (4, 3, 2), (5, 3, 2), (3, 2, 3), (6, 3, 2)]
    ),
    st.integers(1, 3),
    st.data(),
)
def test_no_map_at_all_is_better_than_the_lower_bound(
    shape: tuple[int, int, int], windows: int, data: st.DataObject
) -> None:
    """Against an exhaustive search."""
    num_experts, num_ranks, slots = shape
    load = data.draw(loads(windows, 1, num_experts))
    every_map = _every_map(num_experts, num_ranks, slots)
    bound = lower_bound(load, num_ranks * slots, Topology(num_ranks))[0]
    tiled = np.broadcast_to(load, (windows, every_map.num_layers, num_experts))
    best = window_balancedness(every_map, tiled).max()
    assert best <= 1 / bound
    if windows == 1 and num_experts == num_ranks * slots and slots == 1:
        assert best == pytest.approx(1 / bound)


@given(topologies(), st.data())
def test_maps_with_inactive_ranks_keep_the_lower_bound_too(topology: Topology, data: st.DataObject) -> None:
    expert_map = data.draw(expert_maps(topology=topology))
    load = data.draw(loads(2, expert_map.num_layers, expert_map.num_logical_experts))
    bound = lower_bound(load, expert_map.num_physical_experts, topology)
    assert (bound >= 1).all()
    assert (window_balancedness(expert_map, load) <= 1 / bound).all()


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([(2, 4, 1), (2, 4, 2), (2, 6, 1), (3, 6, 1)]), st.integers(1, 3), st.data())
def test_no_way_to_keep_groups_on_nodes_is_better_than_the_lower_bound(
    shape: tuple[int, int, int], windows: int, data: st.DataObject
) -> None:
    """Against all ways to put groups on nodes, each perfectly level within its nodes."""
    num_nodes, num_groups, ranks_of_node = shape
    load = data.draw(loads(windows, 1, num_groups * 2)).astype(np.float64)
    topology = Topology(num_nodes * ranks_of_node, num_nodes)
    bound = lower_bound(load, num_groups * 2, topology, num_groups)[0]
    by_group = load[:, 0].reshape(windows, num_groups, 2).sum(axis=2)
    each = num_groups // num_nodes
    best = np.inf
    for order in itertools.permutations(range(num_groups)):
        nodes = by_group[:, order].reshape(windows, num_nodes, each).sum(axis=2)
        best = min(best, nodes.max(axis=1).sum() / ranks_of_node)
    mean = load.sum() / topology.num_ranks
    if mean > 0:
        assert bound <= max(best / mean, lower_bound(load, num_groups * 2, topology)[0]) + 1e-9
        if windows == 1 and each == 2 and ranks_of_node == 1:
            assert bound == pytest.approx(best / mean)
