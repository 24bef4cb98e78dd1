"""Weights that are loaded anew while the balancer is at work, over gloo."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from eplb_platform import ExpertMap, Topology
from eplb_platform.runtime import Stage
from eplb_platform.testing.processes import RankPool
from tests.processes.serve_reloaded import Reload, ReloadResult, serve_reloaded
from tests.processes.tagged_model import NUM_EXPERTS, NUM_LAYERS, NUM_REDUNDANT

pytestmark = pytest.mark.processes

NUM_RANKS = 4
INITIAL = ExpertMap.initial(NUM_LAYERS, NUM_EXPERTS, Topology(NUM_RANKS), NUM_REDUNDANT).physical_to_logical
STAGES = [stage for stage in Stage if stage not in (Stage.REBUILD, Stage.TRACE, Stage.RECORD)]
EVERY_RANK = tuple(range(NUM_RANKS))


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as pool:
        yield pool


def check_served_right(results: list[ReloadResult]) -> None:
    """No token was served by a wrong expert, and weights and maps are one on all ranks at the end."""
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    assert [result.misplaced_experts for result in results] == [0] * NUM_RANKS
    for result in results[1:]:
        np.testing.assert_array_equal(result.physical_to_logical, results[0].physical_to_logical)


def check_reloaded(results: list[ReloadResult]) -> None:
    check_served_right(results)
    for result in results:
        assert result.error == ""
        np.testing.assert_array_equal(result.map_after, INITIAL)
        assert result.state_after == "idle"
        assert int(result.stats["commits"] or 0) > result.commits_before, "no later cycle moved anything"
        assert result.stats["failed_cycles"] == 0, result.stats["last_error"]


@pytest.mark.parametrize("held_ranks", [(0,), (2,), EVERY_RANK], ids=["rank 0", "rank 2", "all ranks"])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_may_be_loaded_anew_in_any_stage_of_a_cycle(
    ranks: RankPool, stage: Stage, held_ranks: tuple[int, ...]
) -> None:
    results = ranks.run(serve_reloaded, Reload(str(stage), held_ranks))
    check_reloaded(results)
    assert all(result.stats["cancelled_cycles"] >= 1 for result in results)


def test_weights_may_be_loaded_anew_between_two_cycles(ranks: RankPool) -> None:
    results = ranks.run(serve_reloaded, Reload())
    check_reloaded(results)
    assert all(result.commits_before for result in results)


@pytest.mark.parametrize("before", [True, False])
def test_a_commit_agreed_for_later_is_executed_by_no_rank(ranks: RankPool, before: bool) -> None:
    results = ranks.run(serve_reloaded, Reload("commit", before=before))
    check_reloaded(results)
    assert all(result.was_pending for result in results)


def test_a_promise_that_waits_for_another_ranks_is_void(ranks: RankPool) -> None:
    results = ranks.run(serve_reloaded, Reload("agree", is_promised=True))
    check_reloaded(results)
    assert results[0].was_promised
    assert not results[2].was_promised


@pytest.mark.parametrize("ahead_rank", [0, 3])
@pytest.mark.parametrize("stage", ["", "collect", "commit"])
def test_ranks_may_be_one_boundary_apart(ranks: RankPool, stage: str, ahead_rank: int) -> None:
    check_reloaded(ranks.run(serve_reloaded, Reload(stage, ahead_rank=ahead_rank)))


def test_a_commit_that_one_rank_has_executed_already_is_undone_with_the_rest(ranks: RankPool) -> None:
    """The rank that is ahead passes the agreed boundary before it meets the others."""
    results = ranks.run(serve_reloaded, Reload("commit", ahead_rank=1, at_commit=True))
    check_reloaded(results)
    assert [result.commits_before for result in results] == [0, 1, 0, 0]
    assert [result.was_pending for result in results] == [True, False, True, True]


@pytest.mark.parametrize("absent_rank", [0, 3])
@pytest.mark.parametrize("stage", ["", "fetch", "commit"])
def test_when_one_rank_never_comes_nothing_changes_on_any(
    ranks: RankPool, stage: str, absent_rank: int
) -> None:
    results = ranks.run(serve_reloaded, Reload(stage, absent_rank=absent_rank))
    check_served_right(results)
    for rank, result in enumerate(results):
        error = result.late_error if rank == absent_rank else result.error
        assert "invalidate: rank" in error
        assert "within 2 s; nothing was changed on any rank" in error
        assert "\n" not in error
        np.testing.assert_array_equal(result.map_after, result.map_before)
        assert result.stats["invalidations"] == 0
        assert int(result.stats["commits"] or 0) > result.commits_before


def test_weights_loaded_anew_without_a_word_are_seen(ranks: RankPool) -> None:
    results = ranks.run(serve_reloaded, Reload("", action="forget", before=False))
    assert all(result.wrong_tokens > 0 for result in results)


@pytest.mark.parametrize("stage", ["", "collect", "fetch", "agree", "commit"])
def test_a_drained_balancer_is_idle_and_goes_on(ranks: RankPool, stage: str) -> None:
    results = ranks.run(serve_reloaded, Reload(stage, held_ranks=(2,), action="drain"))
    check_served_right(results)
    for result in results:
        assert result.error == ""
        assert result.state_after == "idle"
        np.testing.assert_array_equal(result.map_after, results[0].map_after)
        assert result.stats["failed_cycles"] == 0, result.stats["last_error"]
        assert int(result.stats["commits"] or 0) > result.commits_before
    if stage == "commit":
        assert any(result.was_pending for result in results)
