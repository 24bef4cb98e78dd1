"""Replicas that take unequal shares of an expert's tokens, over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from eplb_platform import ExpertMap, Topology
from eplb_platform.testing.processes import RankPool
from tests.processes.serve_reloaded import Reload, serve_reloaded
from tests.processes.serve_tagged import Run, RunResult, serve
from tests.processes.tagged_model import NUM_EXPERTS, NUM_LAYERS
from tests.processes.test_invalidation import check_reloaded

pytestmark = pytest.mark.processes

NUM_RANKS = 4
RUN = Run(steps=400, until={"commits": NUM_LAYERS})


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as pool:
        yield pool


def check_served_right(results: list[RunResult]) -> None:
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    assert [result.misplaced_experts for result in results] == [0] * NUM_RANKS
    assert all(result.stats["failed_cycles"] == 0 for result in results), results[0].stats["last_error"]


def test_replicas_take_unequal_shares_while_experts_move(ranks: RankPool) -> None:
    results = ranks.run(serve, RUN.on(weighted_dispatch=True))
    check_served_right(results)
    assert all(result.is_weighted for result in results)
    assert all(int(result.stats["moved_experts"] or 0) > 0 for result in results)


def test_where_no_expert_may_move_shares_alone_level_the_ranks(ranks: RankPool) -> None:
    """Only the commits without moves are left, and they raise balancedness over that of even shares."""
    twice = ExpertMap.round_robin(NUM_LAYERS, NUM_EXPERTS, Topology(NUM_RANKS), NUM_EXPERTS)
    run = replace(
        RUN.on(min_balancedness=0.0),
        num_redundant_experts=NUM_EXPERTS,
        deploy=(twice.physical_to_logical,) * NUM_RANKS,
        steps_per_topic=10**6,
    )
    weighted = ranks.run(serve, replace(run, steps_after=100).on(weighted_dispatch=True))
    still = ranks.run(serve, replace(run, steps=weighted[0].steps_served, until={}))
    check_served_right(weighted)
    for result in weighted:
        assert result.stats["moved_experts"] == 0
        assert result.is_weighted
    assert all(result.stats["commits"] == 0 and not result.is_weighted for result in still)
    gain = [
        levelled.balancedness[-100:] - even.balancedness[-100:]
        for levelled, even in zip(weighted, still, strict=True)
    ]
    assert np.mean(gain) > 0.02


def test_a_layer_on_its_way_through_small_staging_is_never_routed_wrongly(ranks: RankPool) -> None:
    results = ranks.run(serve, RUN.on(weighted_dispatch=True, staging_memory_mb=0.00005))
    check_served_right(results)
    assert all(result.is_weighted for result in results)


def test_weights_loaded_anew_are_routed_to_evenly_at_first(ranks: RankPool) -> None:
    config = {**Reload().config, "weighted_dispatch": True}
    check_reloaded(ranks.run(serve_reloaded, Reload("commit", config=config)))
