"""Ranks that die, leave, are started anew and join, in an engine that calls `resize`."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from eplb_platform.runtime import Stage
from eplb_platform.testing.cluster import FaultPlan, Tally, draw_scenario, simulate
from tests.simulation.test_cluster import CALM

RESIZING = replace(CALM, resizes=True, tolerates_death=True)


@pytest.mark.parametrize("stage", [None, Stage.FETCH, Stage.COMMIT])
@pytest.mark.parametrize(
    ("kind", "joined"), [("rank dead, others go on", 0), ("rank dead, a new process comes", 1)]
)
def test_the_living_go_on_after_a_death(kind: str, joined: int, stage: Stage | None) -> None:
    for seed in range(4):
        result = simulate(replace(RESIZING, seed=seed, faults=(FaultPlan(kind, 4, 3, stage),)))
        assert result.violations == []
        assert result.recovered
        assert result.resizes["agreed"] == 1
        assert result.resizes["ranks joined"] == joined
        assert result.resizes["ranks left"] == 1 - joined


def test_ranks_leave_and_come_back() -> None:
    faults = (FaultPlan("ranks leave", 0, 3), FaultPlan("ranks join", 0, 12))
    result = simulate(replace(RESIZING, faults=faults))
    assert result.violations == []
    assert result.resizes["agreed"] == 2
    assert result.resizes["ranks joined"] == result.resizes["ranks left"] >= 1


def test_a_planner_that_never_answers_holds_up_no_resize() -> None:
    faults = (FaultPlan("planner never answers", 0, 3), FaultPlan("ranks leave", 0, 6))
    result = simulate(replace(RESIZING, faults=faults))
    assert result.violations == []
    assert result.injected["planner never answers"] == result.resizes["agreed"] == 1


def test_a_rank_without_the_store_stops_and_the_others_go_on() -> None:
    """Nothing but `ForwardStopped` may end its forward thread, wherever in `resize` it needs the store."""
    for seed in range(4):
        for rank in (0, 5):
            faults = (FaultPlan("ranks leave", 1, 6), FaultPlan("store gone", rank, 6))
            assert simulate(replace(RESIZING, seed=seed, faults=faults)).violations == []


def test_a_rank_that_was_taken_for_dead_is_gone_though_the_resize_failed() -> None:
    """The others learn that, and do not wait for it in the next pass."""
    refused = 0
    for seed in range(8):
        result = simulate(replace(RESIZING, seed=seed, faults=(FaultPlan("rank taken for dead", 5, 3),)))
        assert result.violations == []
        assert result.recovered
        refused += result.resizes["refused"]
    assert refused


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("rank dies coming to a resize", "did not come in time|no verdict within|rank . has .*, rank . "),
        ("rank dies once a resize is agreed", "not every rank reached 'ended'"),
        ("rank dies in the transfer of a resize", "GroupError: "),
        ("rank dies after a transfer of a resize", "not every rank reached 'chunk/"),
        ("rank dies at the end of a resize", "not every rank reached 'done'"),
    ],
)
def test_a_death_in_a_resize_leaves_the_active_ranks_as_they_were(kind: str, outcome: str, rank: int) -> None:
    """All others learn how it ended, and the next resize is one without the dead or with a new process."""
    deaths, seen = 0, ""
    for seed in range(8):
        faults = (FaultPlan("ranks leave", 0, 3), FaultPlan(kind, rank, 9))
        result = simulate(replace(RESIZING, seed=seed, num_redundant=9, faults=faults), keep_trace=True)
        assert result.violations == []
        assert result.recovered
        deaths += result.injected[kind]
        seen += "\n".join(line for line in result.trace if "the active ranks are what they were" in line)
    assert deaths
    assert re.search(outcome, seen), seen


@pytest.mark.parametrize("stage", [Stage.FETCH, Stage.COMMIT, Stage.RECORD])
def test_a_rank_that_was_taken_for_dead_writes_over_no_record(stage: Stage) -> None:
    """It is the one that recorded; when it wakes, its cycle ends, and another rank records."""
    for seed in range(8):
        taken_for_dead = FaultPlan("rank taken for dead", 0, 3, stage)
        result = simulate(replace(RESIZING, seed=seed, faults=(taken_for_dead,), keeps_files=True))
        assert result.violations == []
        assert result.resizes["ranks left"] == 1


def test_seeds_with_resizes_keep_every_rule() -> None:
    tally = Tally()
    for seed in range(4, 104, 5):
        tally.add(simulate(draw_scenario(seed, 8)))
    assert tally.failures == []
    assert tally.resizes["agreed"] > 10
    assert tally.resizes["experts loaded"] > 0
    assert tally.resizes["calls that named lost experts"] > 0
