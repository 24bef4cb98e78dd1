"""Whole cycles whose exchanges the forward thread enqueues at agreed boundaries, between real processes.

Streams and the collective library are simulated: they run late, and a batch waits for all ranks. Nothing here
is about a real library's numbers, failures or time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from eplb_platform.testing.processes import RankPool
from tests.processes.serve_by_forward import FAULT_RANK, ForwardResult, ForwardRun, serve_by_forward
from tests.processes.tagged_model import NUM_LAYERS

pytestmark = pytest.mark.processes

NUM_RANKS = 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as pool:
        yield pool


def check_served_right(results: list[ForwardResult]) -> None:
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    assert [result.misplaced_experts for result in results] == [0] * NUM_RANKS
    assert [result.exchanges_of_other_threads for result in results] == [0] * NUM_RANKS
    for result in results[1:]:
        np.testing.assert_array_equal(result.physical_to_logical, results[0].physical_to_logical)


def test_every_rank_enqueues_the_same_batches_at_the_same_boundaries(ranks: RankPool) -> None:
    results = ranks.run(serve_by_forward, ForwardRun(until={"commits": NUM_LAYERS}, mixed_step_times=True))
    check_served_right(results)
    for result in results:
        assert result.stats["commits"] >= NUM_LAYERS
        assert result.stats["failed_cycles"] == 0, result.stats["last_error"]
        assert result.enqueued == results[0].enqueued
        # The run may end between the last batch and its commit.
        assert 0 <= len(result.enqueued) - result.stats["commits"] <= 1
        assert result.groups_opened == 1


@pytest.mark.parametrize(
    ("action", "reason", "failures"),
    [
        ("lose_a_batch", "the device has not finished copying into the staging after 3 s", 1),
        ("refuse_one_enqueue", f"rank {FAULT_RANK}: fetch: RuntimeError: the simulated stream is being", 1),
        ("fail_to_open_once", "no new group", 2),
    ],
)
def test_after_a_failed_exchange_the_forward_threads_make_a_new_group_and_go_on(
    ranks: RankPool, action: str, reason: str, failures: int
) -> None:
    until = {"failed_cycles": failures, "commits": NUM_LAYERS}
    run = ForwardRun(steps=0, until=until, action=action, timeout_s=3.0, mixed_step_times=True)
    results = ranks.run(serve_by_forward, run)
    check_served_right(results)
    for result in results:
        assert result.stats["failed_cycles"] >= failures
        assert reason in result.errors
        assert result.stats["commits"] >= NUM_LAYERS, result.errors
        assert result.groups_opened >= 2


@pytest.mark.parametrize("action", ["pause_and_resume_often", "drain_often", "reload_often"])
def test_cycles_that_end_early_leave_no_exchange_behind(ranks: RankPool, action: str) -> None:
    until = {"cancelled_cycles": 3}
    config = {"expert_heat_collection_interval": 1}
    run = ForwardRun(steps=200, until=until, action=action, config=config)
    results = ranks.run(serve_by_forward, run)
    check_served_right(results)
    for result in results:
        assert result.stats["failed_cycles"] == 0, result.stats["last_error"]
        assert result.stats["cancelled_cycles"] >= 3
        assert result.enqueued == results[0].enqueued


def test_it_closes_beside_an_exchange(ranks: RankPool) -> None:
    run = ForwardRun(steps=26, action="close_early", config={"expert_heat_collection_interval": 2})
    results = ranks.run(serve_by_forward, run)
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
