"""Expert load collection: windows, phases, dummy passes, map changes, alignment between ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import MIN_SKEW_STEPS, HeatWindows, LoadCollection, Phase
from eplb_platform.topology import Topology

# One layer, 3 experts on 2 ranks of 2 slots: expert 0 has two replicas.
MAP = ExpertMap([[0, 1, 2, 0]], 3, Topology(2))
MOVED = ExpertMap([[2, 1, 0, 2]], 3, Topology(2))
LOAD = np.array([[1, 10, 100, 1000]])
LOGICAL = [1001, 10, 100]


def heat(steps: int = 4, num_windows: int = 2, **options: Any) -> HeatWindows:
    return HeatWindows(1, 3, steps, num_windows, **options)


def test_replicas_are_summed_and_windows_kept_apart() -> None:
    windows = heat()
    for factor in (1, 2, 3, 4):
        windows.record(LOAD * factor, MAP)
    assert windows.windows().tolist() == [[[3 * load for load in LOGICAL]], [[7 * load for load in LOGICAL]]]


def test_only_the_last_steps_are_covered() -> None:
    windows = heat(steps=4, num_windows=2)
    for factor in range(1, 8):
        windows.record(LOAD * factor, MAP)
    assert windows.steps_recorded == 7
    assert windows.completed_windows == 3
    assert windows.windows()[:, 0, 1].tolist() == [10 * (3 + 4), 10 * (5 + 6)]
    assert windows.windows_until(2)[:, 0, 1].tolist() == [10 * (1 + 2), 10 * (3 + 4)]


@pytest.mark.parametrize(
    ("steps", "num_windows", "per_window", "max_windows"),
    [(600, 16, 38, 15), (16, 16, 1, 16), (10, 16, 1, 10), (1, 16, 1, 1), (31, 16, 2, 15), (7, 1, 7, 1)],
)
def test_windows_never_reach_back_further_than_the_steps(
    steps: int, num_windows: int, per_window: int, max_windows: int
) -> None:
    windows = heat(steps, num_windows)
    for _ in range(2 * steps):
        windows.record(LOAD, MAP)
    assert windows.windows()[:, 0, 1].tolist() == [10 * per_window] * max_windows


def test_before_the_first_window_is_complete_there_is_none() -> None:
    windows = heat()
    assert windows.windows().shape == (0, 1, 3)
    windows.record(LOAD, MAP)
    assert windows.windows().shape == (0, 1, 3)


@pytest.mark.parametrize(
    ("collection", "counted"),
    [("all", [1, 1, 1]), ("prefill", [1, 0, 1]), ("decode", [0, 1, 1])],
)
def test_phases_are_filtered_and_a_mixed_pass_always_counts(collection: str, counted: list[int]) -> None:
    windows = heat(3, 3, collection=LoadCollection(collection))
    for phase in Phase:
        windows.record(LOAD, MAP, phase=phase)
    assert windows.windows()[:, 0, 1].tolist() == [10 * count for count in counted]


def test_a_dummy_pass_is_a_step_without_load() -> None:
    windows = heat(4, 2)
    windows.record(LOAD, MAP, is_dummy=True)
    windows.record(None, MAP)
    windows.record(LOAD, MAP)
    windows.record(LOAD, MAP, is_dummy=True)
    assert windows.windows()[:, 0, 1].tolist() == [0, 10]


def test_counts_follow_the_map_that_they_were_made_under() -> None:
    windows = heat(2, 1)
    windows.record(LOAD, MAP)
    windows.fold(MAP)
    windows.record(LOAD, MOVED)
    assert windows.windows().tolist() == [[[1001 + 100, 10 + 10, 100 + 1001]]]


def test_fold_under_another_map_than_recorded_is_refused() -> None:
    windows = heat()
    windows.fold(MOVED)
    windows.record(LOAD, MAP)
    with pytest.raises(ValueError, match="recorded under"):
        windows.fold(MOVED)


def test_large_counts_do_not_overflow_and_stay_exact() -> None:
    windows = heat(1000, 1)
    tokens = np.full((1, 4), 10**12 + 1, dtype=np.int64)
    for _ in range(1000):
        windows.record(tokens, MAP)
    assert windows.windows()[0, 0].tolist() == [2 * (10**15 + 1000), 10**15 + 1000, 10**15 + 1000]


def test_slots_of_inactive_ranks_count_nothing() -> None:
    shrunk = ExpertMap([[0, 1, 2, -1, -1, -1]], 3, Topology(2, active_ranks=(0,)))
    windows = heat(1, 1)
    windows.record(np.array([[1, 2, 3, 9, 9, 9]], dtype=np.int32), shrunk)
    assert windows.windows().tolist() == [[[1, 2, 3]]]


def test_a_map_with_another_number_of_slots_may_follow() -> None:
    windows = heat(2, 1)
    windows.record(LOAD, MAP)
    windows.record(np.array([[1, 2, 3, 4, 5, 6]]), ExpertMap([[0, 1, 2, 0, 1, 2]], 3, Topology(2)))
    assert windows.windows().tolist() == [[[1001 + 5, 10 + 7, 100 + 9]]]


def test_what_is_given_and_returned_is_not_shared() -> None:
    windows = heat(1, 1)
    load = LOAD.copy()
    windows.record(load, MAP)
    windows.windows()[...] = -1
    assert load.tolist() == LOAD.tolist()
    assert windows.windows().tolist() == [[LOGICAL]]


def test_clear_starts_again() -> None:
    windows = heat(2, 1)
    windows.record(LOAD, MAP)
    windows.clear()
    assert windows.steps_recorded == 0
    windows.record(LOAD, MAP)
    windows.record(LOAD, MAP)
    assert windows.windows().tolist() == [[[2 * load for load in LOGICAL]]]


def test_a_rank_far_ahead_still_has_the_window_another_speaks_of() -> None:
    windows = heat(4, 2)
    for factor in range(4 + MIN_SKEW_STEPS):
        windows.record(LOAD * factor, MAP)
    assert windows.windows_until(2)[:, 0, 1].tolist() == [10 * (0 + 1), 10 * (2 + 3)]


def test_windows_too_old_to_be_kept_are_empty_but_aligned() -> None:
    windows = heat(4, 2)
    for _ in range(1000 + MIN_SKEW_STEPS):
        windows.record(LOAD, MAP)
    assert windows.windows_until(2).tolist() == np.zeros((2, 1, 3)).tolist()


@pytest.mark.parametrize("end", [-1, 1])
def test_windows_that_are_not_complete_are_refused(end: int) -> None:
    with pytest.raises(ValueError, match=f"window {end} "):
        heat().windows_until(end)


@pytest.mark.parametrize(
    "load", [np.zeros((1, 3), int), np.zeros((2, 4), int), np.zeros(4, int), np.zeros((1, 4))]
)
def test_load_of_another_shape_or_type_is_refused(load: np.ndarray) -> None:
    with pytest.raises(ValueError, match="physical_load"):
        heat().record(load, MAP)


def test_a_map_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="1 layers of 3 experts"):
        heat().record(np.zeros((1, 4), int), ExpertMap.initial(1, 4, Topology(2)))


@pytest.mark.parametrize(("steps", "num_windows"), [(0, 1), (1, 0), (-3, 2)])
def test_no_steps_and_no_windows_are_refused(steps: int, num_windows: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        heat(steps, num_windows)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_windows_equal_a_plain_recount_and_are_aligned_between_ranks(data: st.DataObject) -> None:
    """Two ranks with different loads, phases and dummies under a map that changes layer by layer."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    steps, num_windows = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    calls = data.draw(st.integers(0, 30))
    collection = data.draw(st.sampled_from(LoadCollection))
    topology = Topology(2)
    first, second = ExpertMap.initial(3, 4, topology, 2), ExpertMap.round_robin(3, 4, topology, 2)
    maps = [first.replace_layers(range(changed), second) for changed in range(4)]
    ranks = [HeatWindows(3, 4, steps, num_windows, collection) for _ in range(2)]
    per_window = ranks[0].steps_per_window
    expected = np.zeros((2, calls // per_window + 1, 3, 4), dtype=np.int64)
    for call in range(calls):
        expert_map = maps[min(3, call // 3)]
        for rank, windows in enumerate(ranks):
            load, phase = rng.integers(0, 9, (3, 6)), Phase(int(rng.integers(3)))
            is_dummy = bool(rng.integers(4) == 0)
            windows.record(load, expert_map, phase=phase, is_dummy=is_dummy)
            counts = not is_dummy and (collection == "all" or phase.name.lower() in (collection, "mixed"))
            for layer, slot in np.ndindex(3, 6):
                expert = expert_map.physical_to_logical[layer, slot]
                expected[rank, call // per_window, layer, expert] += counts * load[layer, slot]
    completed = calls // per_window
    for rank, windows in enumerate(ranks):
        assert windows.completed_windows == completed
        shown = windows.windows()
        assert len(shown) == min(completed, steps // per_window)
        assert shown.tolist() == expected[rank, completed - len(shown) : completed].tolist()
