"""Planning by compute cost: the blend, falling back to tokens, partial profiles, SGLang's function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform.algorithms import Plan, compute_cost_aware_rebalance_experts, rebalance_experts
from eplb_platform.algorithms.compute_aware import blend
from eplb_platform.balance import window_balancedness
from eplb_platform.cost import ExpertComputeProfiler
from eplb_platform.topology import Topology

TOPOLOGY = Topology(8, 2)
NAMES = ("compute_aware", "compute_aware_hierarchical")
SHAPE = (3, 32)


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(size=SHAPE) * 1000


def cost_per_token(seed: int = 1) -> np.ndarray:
    """[layers, experts], ms; a few experts take many times what others do."""
    return np.random.default_rng(seed).lognormal(sigma=1.5, size=SHAPE)


def planned(load: np.ndarray, algorithm: str = "compute_aware", **options: object) -> Plan:
    options = {"engine": "deepseek"} | options if algorithm != "deepseek" else options
    return rebalance_experts(
        load,
        num_physical_experts=48,
        topology=TOPOLOGY,
        num_expert_groups=4,
        algorithm=algorithm,
        **options,  # type: ignore[arg-type]
    )


def test_the_blend_is_the_published_one() -> None:
    load, cost = tokens(), cost_per_token()
    spent = load * cost
    for alpha in (0.0, 0.3, 1.0):
        scaled = load.sum(axis=1, keepdims=True) * spent / spent.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(blend(load[None], cost, alpha)[0], alpha * scaled + (1 - alpha) * load)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(1e-6, 1e6))
@settings(max_examples=50)
def test_the_blend_keeps_a_layers_total_and_does_not_depend_on_the_unit(
    seed: int, alpha: float, unit: float
) -> None:
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 1000, (4, 2, 6)).astype(np.float64)
    cost = np.where(rng.random((2, 6)) < 0.3, np.nan, rng.lognormal(size=(2, 6)))
    mixed = blend(load, cost, alpha)
    np.testing.assert_allclose(mixed.sum(axis=(0, 2)), load.sum(axis=(0, 2)))
    np.testing.assert_allclose(mixed, blend(load, cost * unit, alpha))
    assert (mixed >= 0).all()


def test_windows_whose_tokens_are_dear_weigh_more() -> None:
    load = np.array([[[10.0, 0.0]], [[0.0, 10.0]]])
    assert blend(load, np.array([[1.0, 3.0]]), 1.0).sum(axis=(1, 2)).tolist() == [5.0, 15.0]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_profile_tokens_decide(name: str) -> None:
    load = tokens()
    groups = 4 if name.endswith("hierarchical") else 1
    expected = rebalance_experts(
        load, num_physical_experts=48, topology=TOPOLOGY, num_expert_groups=groups, algorithm="deepseek"
    )
    for cost in (None, np.full(SHAPE, np.nan)):
        plan = planned(load, name, compute_cost=cost)
        assert plan.expert_map == expected.expert_map
        np.testing.assert_array_equal(plan.balancedness, expected.balancedness)


def test_alpha_goes_from_tokens_alone_to_cost_alone() -> None:
    load, cost = tokens(), cost_per_token()
    by_tokens, half, by_cost = (planned(load, compute_cost=cost, alpha=alpha) for alpha in (0, 0.5, 1))
    assert by_tokens.expert_map == planned(load).expert_map
    assert by_cost.expert_map == planned(load * cost).expert_map
    spent = [window_balancedness(plan.expert_map, load * cost).mean() for plan in (by_tokens, half, by_cost)]
    counted = [window_balancedness(plan.expert_map, load).mean() for plan in (by_tokens, half, by_cost)]
    assert spent[0] < spent[1] < spent[2] and spent[2] > 0.95
    assert counted[0] > counted[1] > counted[2] and counted[0] > 0.95


@pytest.mark.parametrize("kind", ["zipf", "lognormal"])
def test_noisy_measurements_level_the_ranks_time(kind: str) -> None:
    """A token costs each expert lognormal(0.3) milliseconds, measurements are 5 % off; no option is given."""
    rng = np.random.default_rng(5)
    layers, experts, topology = 3, 256, Topology(32)
    zipf = np.stack([rng.permutation(1 / np.arange(1, experts + 1)) for _ in range(layers)])
    expected = 1e5 * zipf if kind == "zipf" else 1e3 * rng.lognormal(size=(layers, experts))
    cost = rng.lognormal(0, 0.3, expected.shape)
    profiler = ExpertComputeProfiler(layers, experts, warmup_steps=0)
    for _ in range(100):
        counts = rng.poisson(expected)
        measured = counts * cost * (1 + 0.05 * rng.normal(size=cost.shape))
        profiler.profile_pass(np.tile(np.arange(experts), (layers, 1)), counts, measured)

    def time_balancedness(profile: np.ndarray | None) -> float:
        plan = rebalance_experts(
            expected,
            num_physical_experts=288,
            topology=topology,
            algorithm="compute_aware",
            compute_cost=profile,
        )
        return float(window_balancedness(plan.expert_map, expected * cost).mean())

    assert time_balancedness(None) < 0.85
    assert time_balancedness(profiler.get_expert_compute_weights()) > 0.99


def test_measures_are_of_the_blend() -> None:
    load, cost = tokens(), cost_per_token()
    plan = planned(load, compute_cost=cost, alpha=0.7)
    np.testing.assert_allclose(
        plan.balancedness, window_balancedness(plan.expert_map, blend(load[None], cost, 0.7))
    )
    assert (plan.balancedness <= 1 / plan.lower_bound + 1e-9).all()


def test_experts_without_a_profile_cost_what_tokens_of_their_layer_cost_on_average() -> None:
    load = np.array([[[30.0, 10.0, 40.0, 20.0]]])
    mixed = blend(load, np.array([[1.0, 5.0, np.nan, np.nan]]), 1.0)
    # 80 ms for 40 tokens: 2 ms each; the layer's 200 ms are worth its 100 tokens.
    np.testing.assert_allclose(mixed[0, 0], [15, 25, 40, 20])
    no_tokens = blend(load * [1, 1, 0, 1], np.array([[np.nan, np.nan, 7.0, np.nan]]), 1.0)
    np.testing.assert_allclose(no_tokens[0, 0], [30, 10, 0, 20])


def test_a_hot_expert_without_a_profile_keeps_its_replicas() -> None:
    load = np.full(SHAPE, 100.0)
    load[:, 5] = 2000
    cost = np.ones(SHAPE)
    cost[:, 5] = np.nan
    assert (planned(load, compute_cost=cost, alpha=1).expert_map.replica_count[:, 5] > 2).all()


def test_hierarchical_keeps_expert_groups_on_nodes_and_the_other_does_not() -> None:
    load, cost = tokens(), cost_per_token()

    def group_is_split(plan: Plan) -> bool:
        by_node = plan.expert_map.physical_to_logical.reshape(SHAPE[0], 2, -1) // 8
        return any(set(layer[0].tolist()) & set(layer[1].tolist()) for layer in by_node)

    assert not group_is_split(planned(load, "compute_aware_hierarchical", compute_cost=cost))
    assert group_is_split(planned(load, "compute_aware", compute_cost=cost))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"engine": "compute_aware"}, "not compute-aware itself"),
        ({"engine": "deepsek"}, "did you mean 'deepseek'"),
        ({"aplha": 0.5}, "has no option 'aplha'"),
        ({"compute_cost": np.ones((3, 31))}, r"compute_cost has shape \(3, 31\)"),
        ({"compute_cost": -np.ones(SHAPE)}, "layer 0, expert 0 is -1"),
        ({"compute_cost": np.full(SHAPE, np.inf)}, "is inf"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(tokens(), **options)


def test_compute_cost_is_not_ignored_in_silence() -> None:
    with pytest.raises(ValueError, match="'deepseek' does not count compute cost"):
        planned(tokens(), "deepseek", compute_cost=np.ones(SHAPE))


def test_options_go_to_the_engine() -> None:
    seeds = [planned(tokens(), engine="random", seed=seed).expert_map for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("hierarchical", [False, True])
def test_the_documented_function_gives_the_three_tables(hierarchical: bool) -> None:
    load, cost = tokens(), cost_per_token()
    placed, slots, count = compute_cost_aware_rebalance_experts(
        load, load * cost, 48, 4, 2, 8, hierarchical, 0.7
    )
    plan = rebalance_experts(
        load,
        num_physical_experts=48,
        topology=TOPOLOGY,
        num_expert_groups=4,
        algorithm=NAMES[hierarchical],
        compute_cost=cost,
        alpha=0.7,
    )
    np.testing.assert_array_equal(placed, plan.expert_map.physical_to_logical)
    assert slots.shape == (*SHAPE, count.max()) and (count == (slots >= 0).sum(axis=2)).all()
    for layer, expert in np.ndindex(SHAPE):
        assert (placed[layer, slots[layer, expert, : count[layer, expert]]] == expert).all()


def test_the_documented_function_falls_back_to_tokens() -> None:
    load = tokens()
    without = compute_cost_aware_rebalance_experts(load, None, 48, 4, 2, 8, False)
    for cost in (np.zeros(SHAPE), np.full(SHAPE, np.nan), 3 * load):
        given_cost = compute_cost_aware_rebalance_experts(load, cost, 48, 4, 2, 8, False, 1.0)
        np.testing.assert_array_equal(given_cost[0], without[0])
    with pytest.raises(ValueError, match="compute_cost_weight has shape"):
        compute_cost_aware_rebalance_experts(load, load[:, :5], 48, 4, 2, 8, False)
