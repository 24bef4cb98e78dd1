"""Ranks leave and join while a model serves, over gloo: every token by the right expert, before and after."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from eplb_platform.testing.processes import RankPool
from tests.processes.serve_resized import ResizeResult, Segment, serve_resized
from tests.processes.serve_tagged import DYNAMIC

pytestmark = pytest.mark.processes

NUM_RANKS = 4
ALL = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as pool:
        yield pool


def check_served_right(results: list[ResizeResult], segments: list[Segment]) -> None:
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    for number, segment in enumerate(segments):
        seen = [results[rank] for rank in segment.active]
        assert [result.errors[number] for result in seen] == [""] * len(seen)
        assert all(result.active[number] for result in seen)
        assert [result.misplaced[number] for result in seen] == [0] * len(seen)
        for result in seen[1:]:
            np.testing.assert_array_equal(result.maps[number], seen[0].maps[number])
        slots = seen[0].maps[number].reshape(len(seen[0].maps[number]), NUM_RANKS, -1)
        for rank in range(NUM_RANKS):
            assert bool((slots[:, rank] == -1).all()) == (rank not in segment.active)


def test_a_drained_rank_leaves_and_joins_again(ranks: RankPool) -> None:
    segments = [
        Segment(ALL),
        Segment((0, 1, 3)),
        Segment(ALL),
        Segment((1, 2, 3)),
        Segment(ALL, until="commits"),
    ]
    results = ranks.run(serve_resized, segments, 16)
    check_served_right(results, segments)
    assert results[1].commits[-1] > results[1].commits[-2], "no cycle moved anything after the last resize"
    assert not results[2].active[1] and not results[0].active[3]


@pytest.mark.parametrize("dead", [(2,), None], ids=["named", "found out"])
def test_a_dead_ranks_experts_are_served_by_the_living(ranks: RankPool, dead: tuple[int, ...] | None) -> None:
    """Every expert has two replicas, on two ranks."""
    left = Segment((0, 1, 3), dead, absent=(2,), timeout_s=None if dead else 6.0, can_load=True)
    segments = [Segment(ALL), left, Segment(ALL, fresh=(2,))]
    results = ranks.run(serve_resized, segments, 16)
    check_served_right(results, segments)


def test_exchanges_that_the_forward_thread_enqueues_move_them_too(ranks: RankPool) -> None:
    """One rank leaves drained, comes back, and dies; a transfer that breaks in between changes nothing."""
    segments = [
        Segment(ALL, steps=30),
        Segment((0, 1, 3), steps=30),
        Segment(ALL, steps=5, fails_on=1),
        Segment(ALL, steps=30),
        Segment((0, 2, 3), (1,), absent=(1,), steps=30, until="commits", can_load=True),
    ]
    config = {**DYNAMIC, "transfer_timeout_s": 8.0}
    results = ranks.run(serve_resized, segments, 8, config, True)
    assert "rank 1: RuntimeError: the transfer broke" in results[0].errors[2]
    for number in (1, 3, 4):
        seen = [results[rank] for rank in segments[number].active]
        assert [result.errors[number] for result in seen] == [""] * len(seen)
        assert [result.misplaced[number] for result in seen] == [0] * len(seen)
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    assert results[0].commits[-1] > results[0].commits[-2], results[0].last_error


def test_lost_experts_are_named_and_nothing_is_served_until_they_are_loaded(ranks: RankPool) -> None:
    without = Segment((0, 2, 3), (1,), absent=(1,), steps=0)
    loading = Segment((0, 2, 3), (1,), absent=(1,), can_load=True)
    segments = [Segment(ALL, steps=5), without, loading]
    results = ranks.run(serve_resized, segments, 8, {**DYNAMIC, "expert_heat_collection_interval": 100})
    lost = results[0].lost[1]
    initial = results[0].maps[0]
    only_on_1 = {
        (layer, int(expert))
        for layer, row in enumerate(initial)
        for expert in set(row[6:12]) - set(row[:6]) - set(row[12:])
    }
    assert set(lost) == only_on_1 and lost
    for rank in (0, 2, 3):
        assert results[rank].lost[1] == lost
        assert f"layer {lost[0][0]}: expert" in results[rank].errors[1]
        assert "\n" not in results[rank].errors[1]
        np.testing.assert_array_equal(results[rank].maps[1], initial)
    check_served_right(results, segments[:1])
    assert [results[rank].errors[2] for rank in (0, 2, 3)] == [""] * 3
    assert [results[rank].misplaced[2] for rank in (0, 2, 3)] == [0] * 3
    assert [results[rank].wrong_tokens for rank in (0, 2, 3)] == [0] * 3


def test_new_processes_take_places_without_redundancy(ranks: RankPool) -> None:
    """Every expert that the old ones had is lost: they load them all."""
    segments = [Segment(ALL, steps=30), Segment(ALL, fresh=(0, 2), until="cycles", can_load=True)]
    results = ranks.run(serve_resized, segments, 0)
    check_served_right(results, segments)
    assert results[1].cycles[1] > results[1].cycles[0]


def test_too_few_slots_are_refused_and_serving_goes_on(ranks: RankPool) -> None:
    segments = [Segment(ALL, steps=30), Segment((0, 1), until="cycles"), Segment(ALL)]
    results = ranks.run(serve_resized, segments, 4)
    for result in results:
        assert (
            "16 logical experts do not fit in 5 slots on each of 2 active ranks: 6 slots are missing"
            in (result.errors[1])
        )
        assert "\n" not in result.errors[1]
        assert result.active[1]
        assert result.cycles[1] > result.cycles[0]
    check_served_right(results, [segments[0]])
    assert [result.errors[2] for result in results] == [""] * NUM_RANKS


@pytest.mark.parametrize("rank", [0, 3])
def test_a_transfer_that_fails_leaves_the_ranks_as_they_were(ranks: RankPool, rank: int) -> None:
    segments = [Segment(ALL, steps=30), Segment((0, 1, 3), fails_on=rank, until="cycles"), Segment((0, 1, 3))]
    results = ranks.run(serve_resized, segments, 8)
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    for result in results:
        assert f"rank {rank}: RuntimeError: the transfer broke" in result.errors[1]
        assert result.active[1]
        assert result.cycles[1] > result.cycles[0], result.last_error
        assert result.errors[2] == ""
    assert not results[2].active[2]


def test_an_active_rank_that_does_not_come_is_named(ranks: RankPool) -> None:
    segments = [Segment(ALL, steps=5), Segment((0, 1, 3), absent=(3,), timeout_s=6.0)]
    results = ranks.run(serve_resized, segments, 8)
    for rank in (0, 1, 2):
        assert (
            "resize: rank 3 did not come in time; the active ranks are what they were"
            in (results[rank].errors[1])
        )


@pytest.mark.parametrize("killed_at", ["before ended", "in the transfer", "after chunk/0"])
def test_a_rank_killed_inside_a_resize_is_left_out_by_the_next(ranks: RankPool, killed_at: str) -> None:
    """kill -9, of a rank that was to stay while another leaves: the others keep their map."""
    dying = Segment((0, 1, 3), killed=3, killed_at=killed_at, steps=0)
    segments = [Segment(ALL, steps=30), dying, Segment((0, 1, 2), (3,), until="cycles", can_load=True)]
    # No cycle comes before the resize: some experts of the initial map are on the leaving rank alone.
    config = {**DYNAMIC, "transfer_timeout_s": 10.0, "expert_heat_collection_interval": 100}
    outcomes = ranks.outcomes(serve_resized, segments, 8, config)
    assert "exit code -9" in (outcomes[3].error or ""), [outcome.error for outcome in outcomes]
    results = [outcome.value for outcome in outcomes[:3]]
    for outcome, result in zip(outcomes, results, strict=False):
        assert result is not None, outcome.error
        assert "the active ranks are what they were" in result.errors[1]
        assert "\n" not in result.errors[1]
        assert result.errors[2] == ""
        assert result.misplaced[2] == 0
        assert result.wrong_tokens == 0
        assert result.cycles[2] > result.cycles[1], result.last_error
    assert ranks.pids == []
