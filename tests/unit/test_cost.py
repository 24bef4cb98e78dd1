"""ExpertComputeProfiler: when it measures, what it makes of it, and planning by time."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from eplb_platform.algorithms import rebalance_experts
from eplb_platform.algorithms.compute_aware import compute_cost_aware_rebalance_experts
from eplb_platform.balance import balancedness, rank_load
from eplb_platform.cost import ExpertComputeProfiler
from eplb_platform.records import RecordError, compute_cost
from eplb_platform.topology import Topology


def profiler(layers: int = 1, experts: int = 4, **options: int) -> ExpertComputeProfiler:
    return ExpertComputeProfiler(layers, experts, **{"warmup_steps": 0, **options})


def test_warm_up_and_interval() -> None:
    profile = profiler(warmup_steps=3, profiling_interval=2)
    measured = []
    for step in range(1, 11):
        profile.on_forward_pass_start()
        profile.profile_expert_execution(0, 0, 1, execution_time_ms=1.0)
        if profile.should_profile_this_pass():
            measured.append(step)
    assert measured == [4, 6, 8, 10]
    assert profile.get_totals()[:, 0, 0].tolist() == [4.0, 4.0, 4.0]
    profile.stop_profiling()
    profile.profile_expert_execution(0, 0, 1, execution_time_ms=1.0)
    assert profile.get_totals()[2].sum() == 4
    profile.reset_statistics()
    assert not profile.profiling_enabled and not profile.get_totals().any()
    off = ExpertComputeProfiler(1, 4, enable_profiling=False, warmup_steps=0)
    off.start_profiling()
    off.profile_expert_execution(0, 0, 1, execution_time_ms=1.0)
    assert not off.get_totals().any()


def test_summary_has_the_documented_layout() -> None:
    profile = profiler(layers=2)
    profile.on_forward_pass_start()
    profile.profile_expert_execution(1, 2, 10, execution_time_ms=5.0)
    profile.profile_expert_execution(1, 2, 30, execution_time_ms=7.0)
    assert profile.get_statistics_summary() == {
        "forward_pass_count": 1,
        "profiling_enabled": True,
        "layers": {
            "layer_1": {
                "expert_2": {
                    "avg_time_per_token_ms": 0.3,
                    "avg_time_per_invocation_ms": 6.0,
                    "total_tokens": 40,
                    "num_invocations": 2,
                }
            }
        },
    }


def test_what_is_not_known_is_not_free() -> None:
    profile = profiler(layers=2)
    profile.profile_expert_execution(0, 0, 10, execution_time_ms=10.0)
    profile.profile_expert_execution(0, 1, 30, execution_time_ms=90.0)
    weights = profile.get_expert_compute_weights()
    np.testing.assert_array_equal(weights[0], [1.0, 3.0, np.nan, np.nan])
    np.testing.assert_array_equal(
        profile.get_expert_compute_weights(0, use_time_per_token=False)[:2], [10, 90]
    )
    load, tokens = profile.get_adjusted_expert_load(np.full((2, 4), 8))
    np.testing.assert_array_equal(load, [[8, 24, 20, 20], [8, 8, 8, 8]])
    np.testing.assert_array_equal(tokens, np.full((2, 4), 8))


class Device:
    """A device that passes events and timers when told."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, end_event: object) -> float:
        assert self.passed
        return 2.0

    def elapsed_ms(self) -> float | None:
        return 3.0 if self.passed else None


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device, profile = Device(), profiler()
    profile.profile_expert_execution(0, 1, 4, start_event=device, end_event=device)
    profile.profile_expert_execution(0, 1, 4, timer=device)
    assert not profile.get_totals().any()
    device.passed = True
    assert profile.get_totals()[:, 0, 1].tolist() == [5.0, 8.0, 2.0]
    monkeypatch.setattr("eplb_platform.cost._MOST_PENDING", 3)
    device.passed = False
    for _ in range(5):
        profile.profile_expert_execution(0, 1, 4, timer=device)
    device.passed = True
    assert profile.get_totals()[2, 0, 1] == 5 and profile.num_dropped == 2


def test_ranks_are_merged() -> None:
    ranks = [profiler(), profiler()]
    ranks[0].profile_expert_execution(0, 0, 10, execution_time_ms=10.0)
    ranks[1].profile_expert_execution(0, 0, 30, execution_time_ms=90.0)
    ranks[1].profile_expert_execution(0, 3, 1, execution_time_ms=1.0)
    whole = profiler()
    whole.add_totals(sum(rank.get_totals() for rank in ranks))
    np.testing.assert_array_equal(whole.get_expert_compute_weights(0), [2.5, np.nan, np.nan, 1.0])
    for wrong in (np.zeros((3, 1, 3)), np.full((3, 1, 4), np.nan), np.full((3, 1, 4), -1.0)):
        with pytest.raises(ValueError, match="totals"):
            whole.add_totals(wrong)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_grouped_kernels_are_taken_apart(noise: float) -> None:
    """Tokens, and the cost of being active, of experts of which one never has tokens; run by run."""
    rng = np.random.default_rng(0)
    cost, activation = rng.lognormal(-5, 0.3, 9), rng.lognormal(-3, 0.3, 9)
    profile, counted = profiler(experts=9), np.zeros((2, 9))
    for _ in range(1000):
        tokens = rng.poisson(2 * rng.lognormal(0, 1, 9)) * (np.arange(9) < 8)
        exact = 0.1 + (tokens > 0) @ activation + tokens @ cost
        profile.profile_grouped_execution(0, tokens, execution_time_ms=exact * (1 + noise * rng.normal()))
        counted += (tokens, tokens > 0)
    weights = profile.get_expert_compute_weights(0)
    assert np.isnan(weights[8])
    expected = (cost + activation * counted[1] / np.maximum(counted[0], 1))[:8]
    np.testing.assert_allclose(weights[:8], expected, rtol=0.1 if noise else 1e-3)
    assert profile.grouped_residual()[0] == pytest.approx(noise, abs=0.01)
    np.testing.assert_array_equal(profile.get_totals()[1:, 0], counted)


def test_grouped_passes_say_the_same_as_single_runs() -> None:
    """Slots in any order, two replicas of one expert, an empty slot, a layer that was not timed."""
    rng = np.random.default_rng(3)
    experts = np.array([[2, 0, 2, -1], [0, 1, 2, 3]])
    passes, runs = profiler(layers=2), profiler(layers=2)
    for _ in range(100):
        tokens = rng.poisson(5, (2, 4))
        tokens[0, 3] = 0
        by_expert = np.bincount(experts[0, :3], tokens[0, :3], 4)
        spent = 0.1 + by_expert @ [1.0, 0.0, 2.0, 0.0]
        passes.profile_grouped_pass(experts, tokens, np.array([spent, 0.0]))
        runs.profile_grouped_execution(0, by_expert, execution_time_ms=spent)
    assert np.isnan(passes.grouped_residual()[1]) and passes.grouped_residual()[0] < 1e-3
    for profile in (passes, runs):
        ratio = profile.get_expert_compute_weights(0)
        assert ratio[2] / ratio[0] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("kind", ["constant", "in step", "ten runs"])
def test_what_grouped_runs_leave_open_stays_near_the_common_cost(kind: str, noise: float) -> None:
    rng = np.random.default_rng(4)
    share = rng.lognormal(3, 1, 16).round() + 1
    profile = profiler(experts=16)
    for _ in range(10 if kind == "ten runs" else 300):
        tokens = share * (1 if kind == "constant" else rng.integers(1, 20))
        spent = float((tokens.sum() * 0.01) * (1 + noise * rng.uniform(-1.7, 1.7)))
        profile.profile_grouped_execution(0, tokens, execution_time_ms=spent)
    weights = profile.get_expert_compute_weights(0)
    assert (weights > 0.002).all() and (weights < 0.05).all()
    fair = weights @ share / share.sum()
    assert fair == pytest.approx(0.01, rel=0.05 + 1.7 * noise)


def test_noise_does_not_blow_up_what_load_in_step_hides() -> None:
    """Experts whose tokens nearly rise and fall together: least squares alone is wrong by far."""
    rng = np.random.default_rng(5)
    share = rng.lognormal(5, 1, 16)
    profile = profiler(experts=16)
    for _ in range(300):
        tokens = np.rint(share * rng.uniform(1, 20) * (1 + 1e-3 * rng.normal(size=16)))
        spent = float(tokens.sum() * 0.01 * (1 + 0.05 * rng.normal()))
        profile.profile_grouped_execution(0, tokens, execution_time_ms=spent)
    assert (np.abs(profile.get_expert_compute_weights(0) / 0.01 - 1) < 0.5).all()


def test_an_interrupted_measurement_says_little() -> None:
    rng = np.random.default_rng(6)
    experts, cost = np.arange(8).reshape(1, 8), rng.lognormal(0, 0.3, 8)
    profile = profiler(experts=8)
    for number in range(320):
        tokens = rng.poisson(50, (1, 8)) + 1
        spent = tokens * cost * (1 + 0.05 * rng.normal(size=(1, 8)))
        spent[0, number % 8] *= 100 if number % 20 == 0 else 1
        profile.profile_pass(experts, tokens, spent)
    np.testing.assert_allclose(profile.get_expert_compute_weights(0), cost, rtol=0.25)


def test_passes_follow_a_rearrangement_and_memory_does_not_grow() -> None:
    profile, held = profiler(layers=3, experts=6), np.array([[0, 1], [2, 3], [4, -1]])
    tokens = np.array([[10, 0], [1, 1], [7, 0]])
    times = np.array([[5.0, 0.0], [1.0, 2.0], [7.0, 0.0]])
    for _ in range(70):
        profile.profile_pass(held, tokens, times)
    profile.profile_pass(held[::-1].copy(), tokens, times)
    totals = profile.get_totals()
    assert totals[:, 0, 0].tolist() == [350.0, 700.0, 70.0]
    assert totals[:, 1, 3].tolist() == [142.0, 71.0, 71.0]
    assert totals[:, 0, 4].tolist() == [5.0, 10.0, 1.0] and not totals[:, 2, 5].any()
    size = len(pickle.dumps(profile._grouped))
    for _ in range(1000):
        profile.profile_pass(held, tokens, times)
        profile.profile_grouped_pass(held, tokens, times[:, 0])
    assert len(pickle.dumps(profile._grouped)) - size < 20_000
    for wrong in (tokens[:2], tokens[:, :1]):
        with pytest.raises(ValueError, match="num_tokens is"):
            profile.profile_pass(held, wrong, times)
    with pytest.raises(ValueError, match="experts is"):
        profile.profile_pass(held[:2], tokens[:2], times[:2])


@pytest.mark.parametrize("load", ["zipf", "lognormal"])
def test_planning_by_noisy_measurements_balances_time(load: str) -> None:
    rng = np.random.default_rng(1)
    layers, experts, topology = 4, 64, Topology(8)
    popularity = 1 / np.arange(1, experts + 1) if load == "zipf" else rng.lognormal(size=experts)
    tokens = np.stack([rng.permutation(popularity) for _ in range(layers)])
    tokens = np.round(tokens / tokens.mean() * 1000)
    cost = rng.lognormal(0, 0.3, (layers, experts))
    profile = profiler(layers, experts)
    for layer, expert in np.ndindex(layers, experts):
        for _ in range(20):
            spent = tokens[layer, expert] * cost[layer, expert] * (1 + 0.05 * rng.normal())
            profile.profile_expert_execution(
                layer, expert, int(tokens[layer, expert]), execution_time_ms=float(spent)
            )
    options = {"num_physical_experts": 80, "topology": topology}
    by_time = rebalance_experts(
        tokens,
        algorithm="compute_aware",
        alpha=1.0,
        compute_cost=profile.get_expert_compute_weights(),
        **options,
    )
    by_tokens = rebalance_experts(tokens, **options)
    reached = [
        balancedness(rank_load(plan.expert_map, tokens * cost)).mean() for plan in (by_time, by_tokens)
    ]
    assert reached[0] > 0.97 and reached[1] < reached[0] - 0.05
    spent, counted = profile.get_adjusted_expert_load(tokens)
    table, _, _ = compute_cost_aware_rebalance_experts(counted, spent, 80, 1, 1, 8, False, alpha=1.0)
    np.testing.assert_array_equal(table, by_time.expert_map.physical_to_logical)


def test_overhead_is_counted() -> None:
    profile = profiler()
    assert profile.overhead_ms == 0
    profile.profile_expert_execution(0, 0, 1, execution_time_ms=1.0)
    assert 0 < profile.overhead_ms < 1000


def test_impossible_measurements() -> None:
    profile = profiler()
    for arguments in ((1, 0, 1), (0, 4, 1), (-1, 0, 1), (0, 0, -1)):
        with pytest.raises(ValueError):
            profile.profile_expert_execution(*arguments, execution_time_ms=1.0)
    for spent in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="execution_time_ms"):
            profile.profile_expert_execution(0, 0, 1, execution_time_ms=spent)
    with pytest.raises(ValueError, match="no time"):
        profile.profile_expert_execution(0, 0, 1)
    with pytest.raises(ValueError, match=r"expected below 1 and \[4\]"):
        profile.profile_grouped_execution(0, [1, 2], execution_time_ms=1.0)
    with pytest.raises(ValueError, match="profiling_interval is 0"):
        ExpertComputeProfiler(1, 1, profiling_interval=0)
    assert not profile.get_totals().any()


@pytest.mark.parametrize("suffix", compute_cost.SUFFIXES)
def test_a_profile_is_written_for_planning(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"cost{suffix}"
    cost = np.array([[1.5, np.nan], [0.1, 3e-9]])
    compute_cost.write(path, cost)
    np.testing.assert_array_equal(compute_cost.read(path), cost)
    for wrong in ([[1.0, -1.0]], [[np.inf]], [1.0], [[]]):
        with pytest.raises(RecordError):
            compute_cost.write(tmp_path / f"wrong{suffix}", wrong)
    with pytest.raises(RecordError, match="suffix"):
        compute_cost.write(tmp_path / "cost.txt", cost)
    assert [file.name for file in tmp_path.iterdir()] == ["new"]
