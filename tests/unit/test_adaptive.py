"""The adaptive algorithm: near the exact optimum, its price of moving, its limits, any shape and load."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform.algorithms import Plan, load_algorithm, rebalance_experts
from eplb_platform.algorithms.adaptive import Adaptive, FlashLB, SwiftBalancer
from eplb_platform.balance import balancedness, moved_experts, rank_load, window_balancedness
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology
from tests.unit.test_deepseek import Instance, instances

TRACES = Path(__file__).parents[2].parent / "shared" / "traces"
COMPILED = os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
large = pytest.mark.skipif(not COMPILED, reason="takes minutes where the kernels are not compiled")
GOLDEN = np.array([[600, 560, 120, 120, 20, 10, 10, 10]])


def plan_of(load: object, slots: int, topology: Topology, **options: object) -> Plan:
    return rebalance_experts(
        load,  # type: ignore[arg-type]
        num_physical_experts=slots,
        topology=topology,
        algorithm="adaptive",
        **options,  # type: ignore[arg-type]
    )


def plan_from(current: ExpertMap, load: object, algorithm: str = "adaptive", **options: object) -> Plan:
    return rebalance_experts(
        load,  # type: ignore[arg-type]
        topology=current.topology,
        current=current,
        algorithm=algorithm,
        **options,  # type: ignore[arg-type]
    )


def drifted(num_layers: int = 4, num_experts: int = 64, seed: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    load = rng.lognormal(size=(num_layers, num_experts)) * 1e4
    return load, load * rng.lognormal(sigma=0.5, size=load.shape)


def test_golden_case_of_eight_loads_reaches_the_optimum() -> None:
    plan = plan_of(GOLDEN, 16, Topology(8))
    assert rank_load(plan.expert_map, GOLDEN).max() == pytest.approx(590 / 3)


@cache
def shares_of_every_map(num_experts: int, num_ranks: int, slots: int) -> np.ndarray:
    """[maps, ranks, experts], the share of an expert that a rank computes, for all maps without doubles."""
    held = np.zeros((0, num_experts), dtype=bool)
    for experts in itertools.combinations(range(num_experts), slots):
        held = np.vstack([held, np.isin(np.arange(num_experts), experts)])
    maps = np.array(list(itertools.combinations_with_replacement(range(len(held)), num_ranks)))
    holds = held[maps]
    count = holds.sum(axis=1, keepdims=True)
    valid = count.min(axis=(1, 2)) > 0
    return holds[valid] / count[valid]


def test_gap_to_the_exact_optimum_on_500_small_instances() -> None:
    rng = np.random.default_rng(5)
    shapes = [
        (4, 2, 3),
        (5, 3, 2),
        (6, 3, 2),
        (5, 3, 3),
        (6, 4, 2),
        (7, 4, 2),
        (7, 3, 3),
        (8, 4, 2),
        (6, 4, 3),
    ]
    gaps = []
    for index in range(500 if COMPILED else 27):
        num_experts, num_ranks, slots = shapes[index % len(shapes)]
        load = np.round(rng.lognormal(sigma=rng.choice([0.5, 1.0, 1.5]), size=(1, num_experts)) * 100) + 1
        optimum = (shares_of_every_map(num_experts, num_ranks, slots) @ load[0]).max(axis=1).min()
        plan = plan_of(load, num_ranks * slots, Topology(num_ranks))
        gaps.append(rank_load(plan.expert_map, load).max() / optimum - 1)
    print(f"gap to the optimum: worst {max(gaps):.3%}, mean {np.mean(gaps):.4%}")
    assert min(gaps) > -1e-9
    assert np.mean(gaps) < 0.001
    assert max(gaps) < 0.05


@large
@pytest.mark.parametrize(("seed", "zipf", "least"), [(0, True, 0.9998), (1, False, 0.9990)])
def test_a_large_first_plan_is_near_optimal(seed: int, zipf: bool, least: float) -> None:
    rng = np.random.default_rng(seed)
    load = rng.permutation(1e6 / np.arange(1, 257))[None] if zipf else rng.lognormal(size=(6, 256)) * 1e4
    plan = plan_of(load, 288, Topology(32))
    assert plan.balancedness.mean() >= least
    assert plan.expert_map.same_rank_replicas.sum() == 0


@large
def test_repair_is_close_to_a_new_plan_for_a_tenth_of_its_moves() -> None:
    load, later = drifted(num_experts=256)
    current = plan_of(load, 288, Topology(32)).expert_map
    repaired = plan_from(current, later)
    anew = plan_of(later, 288, Topology(32))
    assert window_balancedness(current, later).mean() < 0.9
    assert repaired.balancedness.mean() > 0.97
    assert repaired.moved_experts.sum() < 0.15 * moved_experts(current, anew.expert_map).sum()


@large
def test_a_hopeless_map_is_replaced() -> None:
    load = np.random.default_rng(3).permutation(1e6 / np.arange(1, 257))[None]
    plan = plan_from(ExpertMap.initial(1, 256, Topology(32), 32), load)
    assert plan.balancedness[0] > 0.95


@large
def test_what_is_planned_holds_on_forwards_to_come() -> None:
    # Two fields of use take turns; each has its own hot experts, and the sum of both looks even.
    rng = np.random.default_rng(2)
    fields = np.where(np.arange(32) % 4 < 2, 8.0, 1.0), np.where(np.arange(32) % 4 < 2, 1.0, 8.0)
    steps = rng.poisson([fields[step // 5 % 2] * 50 for step in range(80)])[:, None, :]
    seen, unseen = steps[:40], steps[40:]
    current = ExpertMap.initial(1, 32, Topology(16))
    ours = plan_from(current, seen).expert_map
    of_sum = rebalance_experts(
        seen, num_physical_experts=32, topology=Topology(16), algorithm="deepseek"
    ).expert_map
    assert balancedness(rank_load(ours, unseen)).mean() > balancedness(rank_load(of_sum, unseen)).mean() + 0.1


def test_few_moves_keep_up_with_noise_alone() -> None:
    steps = np.random.default_rng(4).poisson(200, size=(120, 3, 64))
    current = plan_of(np.ones((3, 64)), 64, Topology(8)).expert_map
    assert plan_from(current, steps).moved_experts.sum() <= 6


@settings(max_examples=120 if COMPILED else 15, deadline=None)
@given(instances(), st.booleans(), st.sampled_from(["adaptive", "swift_balancer", "flashlb"]))
def test_every_plan_is_valid(instance: Instance, from_current: bool, algorithm: str) -> None:
    load, num_physical_experts, topology, groups, current = instance
    plan = rebalance_experts(
        load,
        num_physical_experts=num_physical_experts,
        topology=topology,
        num_expert_groups=groups,
        current=current if from_current else None,
        algorithm=algorithm,
    )
    assert plan.expert_map.topology == topology
    if plan.expert_map.slots_per_rank <= load.shape[-1]:
        assert plan.expert_map.same_rank_replicas.sum() == 0
    assert (plan.balancedness <= 1 / plan.lower_bound + 1e-9).all()


@settings(max_examples=80 if COMPILED else 10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 3.0]), st.integers(1, 3))
def test_never_worse_than_the_current_map_after_the_price_of_moving(
    seed: int, price: float, num_windows: int
) -> None:
    rng = np.random.default_rng(seed)
    num_ranks, slots = int(rng.integers(2, 7)), int(rng.integers(1, 5))
    topology = Topology(num_ranks)
    num_experts = int(rng.integers(slots, num_ranks * slots + 1))
    load = rng.lognormal(sigma=1.5, size=(num_windows, 2, num_experts))
    current = rebalance_experts(
        np.ones((2, num_experts)),
        num_physical_experts=num_ranks * slots,
        topology=topology,
        algorithm="random",
        seed=seed,
    ).expert_map
    plan = plan_from(current, load, move_price=price)
    paid = price * moved_experts(current, plan.expert_map) / current.num_physical_experts
    assert (1 / plan.balancedness + paid <= 1 / window_balancedness(current, load) + 1e-9).all()


@large
@settings(max_examples=15 if COMPILED else 2, deadline=None)
@given(st.integers(0, 10**6))
def test_names_of_experts_and_ranks_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load, topology = rng.lognormal(size=(1, 60)), Topology(9)
    value = plan_of(load, 81, topology).balancedness
    renamed = rng.permutation(60)
    assert plan_of(load[:, renamed], 81, topology).balancedness == pytest.approx(value, abs=0.005)
    later = load * rng.lognormal(sigma=0.5, size=load.shape)
    current = plan_of(load, 81, topology).expert_map
    repaired = plan_from(current, later)
    moved_ranks = current.by_rank()[:, rng.permutation(9)].reshape(1, -1)
    renamed_ranks = plan_from(ExpertMap(moved_ranks, 60, topology), later)
    assert renamed_ranks.balancedness == pytest.approx(repaired.balancedness, abs=0.005)


@large
@pytest.mark.parametrize("algorithm", ["adaptive", "swift_balancer", "flashlb"])
def test_the_number_of_threads_does_not_matter(algorithm: str) -> None:
    load, later = drifted(num_layers=12, num_experts=64)
    current = plan_of(load, 288, Topology(32), num_threads=1).expert_map
    assert plan_of(load, 288, Topology(32), num_threads=3).expert_map == current
    digests = {
        plan_from(current, np.stack([later] * 2), algorithm, num_threads=threads).expert_map.digest()
        for threads in (1, 2, 5)
    }
    assert len(digests) == 1


def test_limits_of_a_layer_and_of_a_cycle_hold() -> None:
    load, later = drifted()
    current = plan_of(load, 72, Topology(8)).expert_map
    free = plan_from(current, later, move_price=0.01)
    by_layer = plan_from(current, later, move_price=0.01, max_moved_per_layer=3)
    by_cycle = plan_from(current, later, move_price=0.01, max_moved_per_cycle=7)
    assert free.moved_experts.min() > 3
    assert by_layer.moved_experts.max() <= 3
    assert 0 < by_cycle.moved_experts.sum() <= 7
    for limited in (by_layer, by_cycle):
        assert (limited.balancedness >= window_balancedness(current, later)).all()
        assert limited.balancedness.mean() > window_balancedness(current, later).mean()
    assert plan_from(current, later, max_moved_per_layer=0).expert_map == current


def test_swift_balancer_sends_at_most_one_expert_between_two_ranks() -> None:
    load, later = drifted(num_layers=3)
    current = plan_of(load, 64, Topology(4)).expert_map  # without redundancy the sender is known
    plan = plan_from(current, later, "swift_balancer", move_price=0.0)
    rank_of = np.array(
        [[np.flatnonzero((held == e).any(axis=1))[0] for e in range(64)] for held in current.by_rank()]
    )
    for layer, ranks in enumerate(plan.expert_map.by_rank()):
        pairs = [
            (rank_of[layer, e], r) for r, held in enumerate(ranks) for e in held if rank_of[layer, e] != r
        ]
        assert pairs
        assert len(pairs) == len(set(pairs))


def test_moves_within_a_node_are_preferred() -> None:
    load, later = drifted(num_layers=6)
    current = plan_of(load, 64, Topology(8, 2)).expert_map

    def crossing(factor: float) -> int:
        plan = plan_from(current, later, cross_node_factor=factor, move_price=0.05)
        on_node = [moved_experts(node_view(current), node_view(plan.expert_map)).sum()]
        return int(on_node[0])

    assert crossing(20.0) < crossing(1.0)


def node_view(expert_map: ExpertMap) -> ExpertMap:
    """`expert_map` with each node as one rank."""
    topology = Topology(expert_map.topology.num_nodes)
    return ExpertMap(expert_map.physical_to_logical, expert_map.num_logical_experts, topology)


def test_slow_ranks_get_less() -> None:
    load = np.random.default_rng(6).lognormal(sigma=0.5, size=(2, 64))
    speed = [1.0, 1.0, 1.3, 0.8]
    topology = Topology(4)
    for windows in (load, np.stack([load] * 3)):
        found = Adaptive(rank_speed=speed).place(
            windows.reshape(-1, 2, 64),
            num_physical_experts=80,
            topology=topology,
            num_expert_groups=1,
            current=None,
        )
        tokens = rank_load(ExpertMap(found, 64, topology), load)
        assert (tokens / speed).max(axis=1) == pytest.approx(load.sum(axis=1) / sum(speed), rel=0.02)


@pytest.mark.parametrize("from_current", [False, True])
def test_expert_groups_keep_to_their_node(from_current: bool) -> None:
    load, later = drifted(num_experts=32)
    topology = Topology(8, 2)
    plan = plan_of(load, 48, topology, num_expert_groups=4)
    if from_current:
        plan = plan_from(plan.expert_map, later, num_expert_groups=4)
        assert 0 < plan.moved_experts.sum() < 4 * 24
    for ranks in plan.expert_map.by_rank():
        nodes = [set((node // 8).ravel().tolist()) for node in ranks.reshape(2, 4, 6)]
        assert len(nodes[0]) == len(nodes[1]) == 2
        assert not nodes[0] & nodes[1]


def test_groups_come_to_their_node_whatever_the_limits() -> None:
    topology = Topology(4, 2)
    current = ExpertMap.round_robin(2, 8, topology)
    for load in (np.arange(16).reshape(2, 8), np.arange(16).reshape(2, 8) // 8):
        plan = plan_from(current, load, num_expert_groups=2, max_moved_per_layer=1)
        for layer in np.flatnonzero(load.any(axis=1)):
            nodes = plan.expert_map.by_rank()[layer].reshape(2, -1) // 4
            assert (nodes == nodes[:, :1]).all()
        stays = ~load.any(axis=1)
        assert (plan.moved_experts[stays] == 0).all()


def test_a_lost_rank_is_made_up_for_with_few_moves() -> None:
    load, _ = drifted(num_experts=32)
    current = plan_of(load, 48, Topology(8)).expert_map
    plan = rebalance_experts(
        load, topology=Topology(8, active_ranks=range(7)), current=current, algorithm="adaptive"
    )
    assert plan.moved_experts.sum() < 4 * 18
    back = rebalance_experts(load, topology=Topology(8), current=plan.expert_map, algorithm="adaptive")
    assert back.balancedness.mean() > 0.9


def test_doubles_on_a_rank_are_removed_even_where_moving_is_dear() -> None:
    current = ExpertMap([[0, 0, 1, 2, 3, 3]], 4, Topology(2))
    plan = plan_from(current, np.ones((1, 4)), move_price=100.0)
    assert plan.expert_map.same_rank_replicas.tolist() == [0]


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1.0, 1e12, 1e300])
def test_loads_of_any_size_and_ties(scale: float) -> None:
    tied = np.full((3, 2, 16), scale)
    plan = plan_of(tied, 32, Topology(8))
    assert plan.expert_map.replica_count.tolist() == [[2] * 16] * 2
    assert plan_from(plan.expert_map, tied).moved_experts.sum() == 0
    one = np.zeros((1, 16))
    one[0, 3] = scale
    assert plan_of(one, 32, Topology(8)).balancedness == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("move_price", -1.0),
        ("move_price", float("nan")),
        ("move_price", True),
        ("cross_node_factor", 0.5),
        ("max_moved_per_layer", -1),
        ("max_moved_per_cycle", 1.5),
        ("num_threads", 0),
        ("rank_speed", [1.0, 0.0]),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: object) -> None:
    for algorithm in (Adaptive, SwiftBalancer, FlashLB):
        with pytest.raises(ValueError, match=f"{option} is "):
            algorithm(**{option: value})  # type: ignore[arg-type]


def test_speeds_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="rank_speed has 2 values, expected 8"):
        plan_of(GOLDEN, 16, Topology(8), rank_speed=(1.0, 2.0))


def test_it_is_installed_under_its_names() -> None:
    assert load_algorithm("adaptive") is Adaptive
    assert load_algorithm("swift_balancer") is SwiftBalancer
    assert load_algorithm("flashlb") is FlashLB


def test_the_same_plan_without_compilation_and_nothing_left_to_compile_after_warm_up() -> None:
    code = """
import sys
import numpy as np
from eplb_platform.algorithms import load_algorithm, rebalance_experts
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology
topology = Topology(4, 2)
rng = np.random.default_rng(0)
def plans():
    for windows in (1, 3, 9):
        load = rng.integers(1, 100, (windows, 2, 16)) ** 2
        for groups in (1, 2):
            for current in (None, ExpertMap.initial(2, 16, topology, 8)):
                yield rebalance_experts(load, num_physical_experts=24, topology=topology,
                    num_expert_groups=groups, current=current, algorithm="adaptive").expert_map.digest()
def compiled():
    modules = [vars(module) for name, module in sys.modules.items() if name.endswith("_kernels")]
    kernels = {kernel for module in modules for kernel in module.values() if hasattr(kernel, "signatures")}
    return sum(len(kernel.signatures) for kernel in kernels)
if PURE:
    print(*plans())
else:
    load_algorithm("adaptive")().warm_up()
    before = compiled()
    print(*plans())
    assert compiled() == before > 0, "compiled after the warm-up"
"""
    pure, compiled = (
        subprocess.run(
            [sys.executable, "-c", f"PURE = {disabled == '1'}\n{code}"],
            env={**os.environ, "NUMBA_DISABLE_JIT": disabled},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for disabled in ("1", "0")
    )
    assert pure == compiled


@large
@pytest.mark.skipif(not TRACES.is_dir(), reason="no recorded traces here")
@pytest.mark.parametrize(
    ("past", "future", "least", "most_moved"),
    [
        ("decode_in1000out1000", "decode_in1800out100", 0.980, 0.07),
        ("prefill_in1000out1000", "decode_in1000out1000", 0.970, 0.18),
        ("prefill_in1024", "prefill_in2048", 0.980, 0.14),
    ],
)
def test_recorded_loads_are_followed(past: str, future: str, least: float, most_moved: float) -> None:
    from safetensors.numpy import load_file

    seen, unseen = (
        load_file(TRACES / f"deepseek_r1_{name}.safetensors")["expert_load"] for name in (past, future)
    )
    plan = plan_from(plan_of(seen, 288, Topology(32)).expert_map, unseen)
    assert plan.balancedness.mean() >= least
    assert plan.moved_experts.sum() <= most_moved * plan.expert_map.physical_to_logical.size
