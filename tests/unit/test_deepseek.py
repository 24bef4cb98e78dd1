"""DeepSeek's algorithm through rebalance_experts: known answers, awkward shapes, properties of every plan."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform.algorithms import Plan
from eplb_platform.algorithms import rebalance_experts as rebalance_with_any
from eplb_platform.balance import rank_load, window_balancedness
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

rebalance_experts = partial(rebalance_with_any, algorithm="deepseek")

TRACES = Path(__file__).parents[2].parent / "shared" / "traces"

PUBLISHED_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_PLACEMENT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


Instance = tuple[np.ndarray, int, Topology, int, ExpertMap]


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Load, physical experts, topology, expert groups, current map: small and often degenerate."""
    groups = draw(st.integers(1, 4))
    num_experts = groups * draw(st.integers(1, 4))
    num_ranks = draw(st.integers(1, 6))
    active = draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
    topology = Topology(num_ranks, draw(st.integers(1, num_ranks)), tuple(active))
    least = -(-num_experts // len(active))
    slots = draw(st.integers(least, least + 3))
    tokens = st.sampled_from([0, 1, 2, 3, 7, 50, 10**12]) | st.integers(0, 100)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), num_experts)
    flat = draw(st.lists(tokens, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    was = draw(st.sampled_from([topology, Topology(num_ranks)]))
    held_slots = max(slots, draw(st.integers(least, least + 3)))
    make = draw(st.sampled_from([ExpertMap.initial, ExpertMap.round_robin]))
    current = make(shape[1], num_experts, was, held_slots * was.num_active_ranks - num_experts)
    return np.array(flat).reshape(shape), slots * num_ranks, topology, groups, current


def held(expert_map: ExpertMap) -> list[list[set[int]]]:
    return [[set(rank) for rank in layer] for layer in expert_map.by_rank().tolist()]


def hottest_rank(plan: Plan, load: object) -> float:
    return float(rank_load(plan.expert_map, load).max())


def test_places_the_published_example_as_published() -> None:
    plan = rebalance_experts(
        PUBLISHED_LOAD, num_physical_experts=16, topology=Topology(8, 2), num_expert_groups=4
    )
    assert plan.expert_map.physical_to_logical.tolist() == PUBLISHED_PLACEMENT


def test_a_current_map_changes_neither_the_published_balance_nor_its_nodes() -> None:
    topology = Topology(8, 2)
    current = ExpertMap.initial(2, 12, topology, 4)
    plan = rebalance_experts(PUBLISHED_LOAD, topology=topology, num_expert_groups=4, current=current)
    for ranks, published in zip(plan.expert_map.by_rank(), PUBLISHED_PLACEMENT, strict=True):
        nodes = {tuple(sorted(node.ravel())) for node in ranks.reshape(2, 4, 2)}
        assert nodes == {tuple(sorted(published[:8])), tuple(sorted(published[8:]))}
        assert sorted(map(sorted, ranks.tolist())) == sorted(
            map(sorted, np.reshape(published, (8, 2)).tolist())
        )
    cold = rebalance_experts(
        PUBLISHED_LOAD, num_physical_experts=16, topology=topology, num_expert_groups=4
    ).moved_experts
    assert (plan.moved_experts < cold).all()


def test_golden_case_of_eight_loads() -> None:
    load = [[600, 560, 120, 120, 20, 10, 10, 10]]
    plan = rebalance_experts(load, num_physical_experts=16, topology=Topology(8))
    assert hottest_rank(plan, load) == 232
    assert plan.balancedness == pytest.approx([181.25 / 232])
    assert plan.lower_bound <= 196.67 / 181.25 + 1e-9


def test_a_stuck_greedy_swaps_instead_of_doubling_up() -> None:
    # Experts 1 and 2 fill ranks 0 and 1, and both replicas of 3 are left for rank 2.
    load = [[11, 0, 0, 0]]
    plan = rebalance_experts(load, num_physical_experts=9, topology=Topology(3))
    assert plan.expert_map.same_rank_replicas.tolist() == [0]


@pytest.mark.parametrize(
    ("num_experts", "slots", "ranks", "nodes"),
    [(8, 1, 8, 1), (8, 1, 8, 2), (12, 3, 4, 2), (8, 4, 6, 4), (8, 3, 5, 2), (4, 4, 16, 2), (7, 2, 5, 3)],
    ids=["one slot", "one slot, nodes", "no redundancy", "uneven nodes", "odd", "many redundant", "prime"],
)
def test_awkward_shapes_are_placed_well(num_experts: int, slots: int, ranks: int, nodes: int) -> None:
    load = np.arange(1, num_experts + 1)[None] ** 2
    plan = rebalance_experts(
        load,
        num_physical_experts=slots * ranks,
        topology=Topology(ranks, nodes),
        num_expert_groups=num_experts,
    )
    assert plan.expert_map.same_rank_replicas.sum() == 0
    assert (plan.balancedness <= 1 / plan.lower_bound + 1e-12).all()


def test_a_single_hot_expert_gets_a_replica_on_every_rank_and_no_more() -> None:
    load = np.zeros((1, 8))
    load[0, 3] = 1e12
    plan = rebalance_experts(load, num_physical_experts=32, topology=Topology(8))
    assert plan.expert_map.replica_count[0, 3] == 8
    assert plan.expert_map.same_rank_replicas.sum() == 0
    assert plan.balancedness.tolist() == [1.0]


def test_equal_large_loads_get_equal_replicas() -> None:
    plan = rebalance_experts(np.full((1, 32), 10**9 + 1), num_physical_experts=64, topology=Topology(8))
    assert plan.expert_map.replica_count.tolist() == [[2] * 32]
    assert plan.balancedness == pytest.approx([1.0])


def test_without_load_the_current_map_stays() -> None:
    topology = Topology(4, 2)
    current = ExpertMap.round_robin(3, 8, topology, 4)
    for groups in (1, 2):
        plan = rebalance_experts(
            np.zeros((3, 8)), topology=topology, num_expert_groups=groups, current=current
        )
        assert plan.expert_map == current
        assert plan.moved_experts.tolist() == [0, 0, 0]


def test_a_balanced_layer_stays_while_another_moves() -> None:
    topology = Topology(4)
    current = ExpertMap.initial(2, 8, topology)
    load = np.array([[5] * 8, [9, 9, 1, 1, 1, 1, 1, 1]])
    plan = rebalance_experts(load, topology=topology, current=current)
    assert plan.moved_experts[0] == 0
    assert plan.moved_experts[1] > 0


def test_inactive_ranks_get_nothing_and_a_rank_that_returns_is_used() -> None:
    load = np.arange(1, 9)[None]
    without = Topology(4, active_ranks=(0, 1, 3))
    current = ExpertMap.initial(1, 8, Topology(4), 4)
    shrunk = rebalance_experts(load, topology=without, current=current).expert_map
    assert (shrunk.by_rank()[:, 2] == -1).all()
    regrown = rebalance_experts(load, topology=Topology(4), current=shrunk).expert_map
    assert (regrown.by_rank() >= 0).all()


def test_groups_stay_on_one_node_where_all_nodes_lost_as_many_ranks() -> None:
    topology = Topology(8, 2, active_ranks=(0, 1, 2, 5, 6, 7))
    load = np.random.default_rng(3).integers(1, 100, (4, 16))
    plan = rebalance_experts(load, num_physical_experts=32, topology=topology, num_expert_groups=4)
    for layer in plan.expert_map.by_rank():
        first, second = (set((node[node >= 0] // 4).tolist()) for node in layer.reshape(2, -1))
        assert len(first) == len(second) == 2
        assert not first & second


@pytest.mark.parametrize("groups", [1, 3])
def test_groups_that_do_not_divide_onto_nodes_are_placed_globally(groups: int) -> None:
    load = np.random.default_rng(5).integers(1, 100, (2, 12))
    on_nodes = rebalance_experts(
        load, num_physical_experts=16, topology=Topology(8, 2), num_expert_groups=groups
    )
    alone = rebalance_experts(load, num_physical_experts=16, topology=Topology(8))
    assert np.array_equal(on_nodes.expert_map.physical_to_logical, alone.expert_map.physical_to_logical)


def test_windows_are_summed_to_place_and_scored_one_by_one() -> None:
    windows = np.array([[[8, 0, 4, 4]], [[0, 8, 4, 4]]])
    plan = rebalance_experts(windows, num_physical_experts=4, topology=Topology(2))
    summed = rebalance_experts(windows.sum(axis=0), num_physical_experts=4, topology=Topology(2))
    assert plan.expert_map == summed.expert_map
    assert plan.balancedness == window_balancedness(plan.expert_map, windows)


@settings(max_examples=200, deadline=None)
@given(instances(), st.booleans())
def test_every_plan_is_valid(instance: Instance, from_current: bool) -> None:
    load, num_physical_experts, topology, groups, current = instance
    plan = rebalance_experts(
        load,
        num_physical_experts=num_physical_experts,
        topology=topology,
        num_expert_groups=groups,
        current=current if from_current else None,
    )
    # ExpertMap itself refuses missing experts, ids out of range and experts on inactive ranks.
    assert plan.expert_map.topology == topology
    assert plan.expert_map.num_physical_experts == num_physical_experts
    if plan.expert_map.slots_per_rank <= load.shape[-1]:
        assert plan.expert_map.same_rank_replicas.sum() == 0
    assert (plan.balancedness <= 1 / plan.lower_bound + 1e-9).all()


@settings(max_examples=150, deadline=None)
@given(instances())
def test_experts_that_stay_on_a_rank_keep_their_slots(instance: Instance) -> None:
    load, num_physical_experts, topology, groups, current = instance
    plan = rebalance_experts(
        load,
        num_physical_experts=num_physical_experts,
        topology=topology,
        num_expert_groups=groups,
        current=current,
    )
    common = min(plan.expert_map.slots_per_rank, current.slots_per_rank)
    for old, new in zip(
        current.by_rank().reshape(-1, current.slots_per_rank).tolist(),
        plan.expert_map.by_rank().reshape(-1, plan.expert_map.slots_per_rank).tolist(),
        strict=True,
    ):
        for expert in set(old[:common]) & set(new) - {-1}:
            assert any(old[slot] == new[slot] == expert for slot in range(common))


@settings(max_examples=60, deadline=None)
@given(instances())
def test_a_map_just_made_is_kept(instance: Instance) -> None:
    load, num_physical_experts, topology, groups, _ = instance
    first = rebalance_experts(
        load, num_physical_experts=num_physical_experts, topology=topology, num_expert_groups=groups
    )
    again = rebalance_experts(load, topology=topology, num_expert_groups=groups, current=first.expert_map)
    assert again.moved_experts.sum() == 0


def test_plans_do_not_depend_on_threads() -> None:
    load = np.random.default_rng(7).lognormal(size=(6, 32))
    topology = Topology(8, 2)

    def plan(_: int) -> bytes:
        made = rebalance_experts(load, num_physical_experts=40, topology=topology, num_expert_groups=4)
        return made.expert_map.physical_to_logical.tobytes()

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(plan, range(16)))) == 1


def test_after_drift_few_more_than_the_needed_experts_move() -> None:
    rng = np.random.default_rng(11)
    load = rng.lognormal(size=(4, 64))
    topology = Topology(8)
    old = rebalance_experts(load, num_physical_experts=72, topology=topology).expert_map
    load = load * rng.lognormal(sigma=0.25, size=load.shape)
    cold = rebalance_experts(load, num_physical_experts=72, topology=topology).expert_map
    warm = rebalance_experts(load, topology=topology, current=old)
    apart = sum(
        len(new - was)
        for layers in zip(held(cold), held(old), strict=True)
        for new, was in zip(*layers, strict=True)
    )
    assert warm.moved_experts.sum() < 0.9 * apart
    assert (warm.balancedness >= window_balancedness(cold, load) - 1e-9).all()


@pytest.mark.skipif(not TRACES.is_dir(), reason="no recorded traces here")
def test_recorded_loads_are_balanced_within_two_percent() -> None:
    from safetensors.numpy import load_file

    for path in sorted(TRACES.glob("*.safetensors")):
        plan = rebalance_experts(
            load_file(path)["expert_load"], num_physical_experts=288, topology=Topology(32)
        )
        assert plan.balancedness.min() > 0.98, path.name
        assert plan.expert_map.same_rank_replicas.sum() == 0
