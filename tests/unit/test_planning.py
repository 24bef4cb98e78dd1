from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from eplb_platform import ExpertMap, Topology
from eplb_platform.balance import moved_experts, window_balancedness
from eplb_platform.runtime.planning import AlgorithmPlanner, LoadHistory, PlannerTimeout
from eplb_platform.runtime.ports import run_blocking

LAYERS, EXPERTS = 3, 16
CURRENT = ExpertMap.initial(LAYERS, EXPERTS, Topology(4), num_redundant_experts=4)


def skewed_load() -> NDArray[np.int64]:
    """[windows, layers, logical]; layer 0 is served perfectly by CURRENT, the others are skewed."""
    load = np.random.default_rng(0).zipf(1.5, size=(5, LAYERS, EXPERTS)).clip(max=1000).astype(np.int64)
    even = np.ones(EXPERTS, dtype=np.int64) * 100
    even[: CURRENT.num_redundant_experts] = 200
    load[:, 0] = even
    return load


def planner(**rules: float | int | None) -> AlgorithmPlanner:
    return AlgorithmPlanner("deepseek", num_expert_groups=1, timeout_s=60.0, **rules)  # type: ignore[arg-type]


def test_it_moves_only_layers_that_gain() -> None:
    load = skewed_load()
    planned = run_blocking(planner().plan(load, CURRENT))
    assert (window_balancedness(planned, load) >= window_balancedness(CURRENT, load)).all()
    assert (window_balancedness(planned, load)[1:] > window_balancedness(CURRENT, load)[1:]).all()


def test_layers_above_the_wanted_balancedness_stay() -> None:
    load = skewed_load()
    before = window_balancedness(CURRENT, load)
    threshold = float(np.sort(before)[1])
    planned = run_blocking(planner(min_balancedness=threshold).plan(load, CURRENT))
    assert (moved_experts(CURRENT, planned)[before >= threshold] == 0).all()
    assert moved_experts(CURRENT, planned)[before < threshold].all()


def test_layers_that_would_move_too_much_stay() -> None:
    load = skewed_load()
    free = moved_experts(CURRENT, run_blocking(planner().plan(load, CURRENT)))
    limit = int(free.max()) - 1
    limited = moved_experts(
        CURRENT, run_blocking(planner(max_moved_experts_per_layer=limit).plan(load, CURRENT))
    )
    np.testing.assert_array_equal(limited, np.where(free > limit, 0, free))


def test_nothing_to_gain_gives_back_the_current_map() -> None:
    load = np.full((2, LAYERS, EXPERTS), 0, dtype=np.int64)
    assert run_blocking(planner().plan(load, CURRENT)) is CURRENT


def test_a_recorded_map_serves_the_load_of_all_cycles() -> None:
    """Two kinds of traffic take turns: a map planned for both beats one planned for the last alone."""
    draw = np.random.default_rng(3)
    kinds = draw.lognormal(sigma=1.5, size=(2, LAYERS, EXPERTS)) * 1e4
    cycles = [draw.poisson(kinds[i % 2], size=(4, LAYERS, EXPERTS)).astype(np.int64) for i in range(4)]
    recording = AlgorithmPlanner("adaptive", num_expert_groups=1, timeout_s=60.0, history=LoadHistory())
    recorded = [run_blocking(recording.plan(cycle, CURRENT)) for cycle in cycles][-1]
    last_alone = run_blocking(AlgorithmPlanner("adaptive", 1, 60.0).plan(cycles[-1], CURRENT))
    seen = np.concatenate(cycles)
    assert window_balancedness(recorded, seen).mean() > window_balancedness(last_alone, seen).mean()


def test_a_history_is_bounded_and_forgets_no_token() -> None:
    history = LoadHistory(capacity=8)
    load = np.arange(21 * LAYERS * EXPERTS).reshape(21, LAYERS, EXPERTS)
    kept = [history.add(load[start : start + 3]) for start in range(0, 21, 3)][-1]
    assert len(kept) <= 8
    np.testing.assert_array_equal(kept.sum(axis=0), load.sum(axis=0))


class StuckPlanner(AlgorithmPlanner):
    """An algorithm that never answers."""

    def choose(self, load: NDArray[np.int64], current: ExpertMap) -> ExpertMap:
        threading.Event().wait()
        return current


def test_an_algorithm_that_never_answers_is_given_up() -> None:
    stuck = StuckPlanner("deepseek", num_expert_groups=1, timeout_s=0.05)
    with pytest.raises(PlannerTimeout, match=r"'deepseek' gave no plan within 0\.05 s"):
        run_blocking(stuck.plan(skewed_load(), CURRENT))


def test_an_error_of_the_algorithm_reaches_the_cycle() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        run_blocking(planner().plan(-1 - skewed_load(), CURRENT))
