"""Maps that survive the loss of a rank or a node."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform import ExpertMap, Topology, rebalance_experts
from eplb_platform.algorithms.survival import Survival, check_survival, survivable, survives
from eplb_platform.migration.resized_map import experts_without
from eplb_platform.runtime.planning import AlgorithmPlanner
from tests.unit.strategies import expert_maps, topologies

WIDE = Topology(8, 4)


def survives_every_loss(expert_map: ExpertMap, survive: Survival) -> bool:
    """By the definition: take each rank or node away."""
    topology = expert_map.topology
    ranks = range(topology.num_ranks)
    fate = list(ranks) if survive == "rank" else topology.node_of_rank.tolist()
    return not any(
        experts_without(expert_map, [rank for rank in ranks if fate[rank] == lost]) for lost in set(fate)
    )


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["rank", "node"]), st.integers(0, 2**32 - 1))
def test_any_map_is_made_to_survive_where_that_is_possible(
    data: st.DataObject, survive: Survival, seed: int
) -> None:
    topology = data.draw(topologies())
    expert_map = data.draw(expert_maps(topology=topology))
    experts = expert_map.num_logical_experts
    try:
        check_survival(survive, experts, expert_map.num_physical_experts, topology)
    except ValueError:
        assert not survives_every_loss(expert_map, survive)
        return
    load = np.random.default_rng(seed).lognormal(sigma=2.0, size=(2, expert_map.num_layers, experts))
    secured = ExpertMap(survivable(expert_map, load, survive), experts, topology)
    assert survives_every_loss(secured, survive)
    assert survives(secured, survive).all()
    kept = survives(expert_map, survive)
    np.testing.assert_array_equal(
        secured.physical_to_logical[kept], expert_map.physical_to_logical[kept], "a layer that survived moved"
    )


def test_it_is_refused_exactly_where_no_map_survives() -> None:
    """All topologies, slots and experts that are small enough to try every map."""
    for ranks, slots, experts in product((1, 2, 3), (1, 2, 3), (1, 2, 3)):
        if not experts <= ranks * slots <= 6:
            continue
        for nodes, survive in product(range(1, ranks + 1), ("rank", "node")):
            topology = Topology(ranks, nodes)
            tables = [
                table
                for table in product(range(experts), repeat=ranks * slots)
                if set(table) == set(range(experts))
            ]
            possible = any(survives_every_loss(ExpertMap([t], experts, topology), survive) for t in tables)
            try:
                check_survival(survive, experts, ranks * slots, topology)
            except ValueError:
                assert not possible, (ranks, slots, experts, nodes, survive)
                continue
            assert possible, (ranks, slots, experts, nodes, survive)
            load = np.arange(1.0, experts + 1.0).reshape(1, 1, -1)
            for table in tables[:: max(1, len(tables) // 20)]:
                given_map = ExpertMap([table], experts, topology)
                made = ExpertMap(survivable(given_map, load, survive), experts, topology)
                assert survives_every_loss(made, survive), (table, nodes, survive)


@pytest.mark.parametrize("survive", ["rank", "node"])
@pytest.mark.parametrize("algorithm", ["adaptive", "deepseek", "random"])
def test_every_algorithm_survives_at_a_price_that_the_plan_tells(algorithm: str, survive: Survival) -> None:
    load = np.random.default_rng(3).lognormal(sigma=1.5, size=(4, 3, 32))
    plan = rebalance_experts(
        load, num_physical_experts=80, topology=WIDE, algorithm=algorithm, survive=survive
    )
    assert survives_every_loss(plan.expert_map, survive)
    assert plan.unconstrained is not None
    if algorithm != "random":
        assert not survives_every_loss(plan.unconstrained.expert_map, survive)
    assert (plan.expert_map.same_rank_replicas <= plan.unconstrained.expert_map.same_rank_replicas).all()
    assert (plan.balancedness <= 1 / plan.lower_bound + 1e-9).all()
    if algorithm != "random":
        assert plan.balancedness.mean() > 0.75 * plan.unconstrained.balancedness.mean()


def test_the_error_says_how_many_slots_it_takes() -> None:
    load = np.ones((1, 256))
    with pytest.raises(
        ValueError, match=r"takes 16 slots on each of 32 .*\(512 physical experts\).* are 9 \(288"
    ):
        rebalance_experts(load, num_physical_experts=288, topology=Topology(32, 4), survive="rank")
    rebalance_experts(load, num_physical_experts=512, topology=Topology(32, 4), survive="node")
    with pytest.raises(ValueError, match="takes at least 2 active nodes, there is 1"):
        rebalance_experts(load, num_physical_experts=512, topology=Topology(32, 1), survive="node")
    with pytest.raises(ValueError, match="survive is 'rack', expected one of 'none', 'rank', 'node'"):
        rebalance_experts(load, num_physical_experts=512, topology=WIDE, survive="rack")  # type: ignore[arg-type]


def test_serving_moves_what_would_be_lost_though_it_balances_nothing() -> None:
    planner = AlgorithmPlanner("deepseek", 1, 10.0, min_balancedness=0.0, survive="node")
    load = np.full((1, 2, 8), 100)
    current = ExpertMap.initial(2, 8, WIDE, 16)
    assert not survives_every_loss(ExpertMap.initial(2, 8, WIDE, 0), "node")
    at_risk = ExpertMap(np.sort(current.physical_to_logical, axis=1), 8, WIDE)
    assert not survives_every_loss(at_risk, "node")
    planned = planner.choose(load, at_risk)
    assert survives_every_loss(planned, "node")
    assert planner.choose(load, planned) is planned


def test_fewer_active_ranks_are_balanced_though_they_survive_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    planner = AlgorithmPlanner("deepseek", 1, 10.0, survive="rank")
    current = ExpertMap.initial(2, 8, Topology(4, 1, (0, 1)), 4)
    load = np.array([[[1, 1, 1, 1, 1, 100, 1, 1]] * 2])
    assert planner.choose(load, current) != current
    assert "planning without it: survive='rank' takes 8 slots" in caplog.text
