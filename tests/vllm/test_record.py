"""Two ranks that only record: nothing moves, and the map is one that serves that load well."""

from __future__ import annotations

import numpy as np

from eplb_platform import balance
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import load_trace
from tests.vllm.conftest import Recording


def test_recording_changes_no_token(recording: Recording, unbalanced: list[list[int]]) -> None:
    assert all(tokens == unbalanced for tokens in recording.tokens)


def test_recording_moves_nothing(recording: Recording) -> None:
    before, after = recording.layouts
    assert before == after
    for status in recording.statuses:
        assert status["cycles"] >= 10
        assert (status["commits"], status["moved_experts"], status["failed_cycles"]) == (0, 0, 0)


def test_map_is_better_than_the_one_in_force_and_as_good_after_ten_cycles(recording: Recording) -> None:
    trace = np.asarray(load_trace.read(recording.trace).expert_load)
    windows = np.array([window.sum(axis=0) for window in np.array_split(trace, 16)])
    first, last = ExpertMap.load(recording.first), ExpertMap.load(recording.last)
    in_force = ExpertMap(np.array(recording.layouts[0][0]), first.num_logical_experts, first.topology)
    none, once, tenfold = (
        float(balance.window_balancedness(some, windows).mean()) for some in (in_force, first, last)
    )
    assert once > none
    assert tenfold > none
    assert tenfold > once - 0.01
