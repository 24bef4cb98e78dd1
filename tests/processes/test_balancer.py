"""The balancer in real processes over gloo, with a model whose tokens show which expert served them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eplb_platform import ExpertMap
from eplb_platform.runtime import Stage
from eplb_platform.testing.processes import RankPool
from tests.processes.serve_tagged import Run, RunResult, serve
from tests.processes.tagged_model import NUM_LAYERS

pytestmark = pytest.mark.processes

NUM_RANKS = 4
LONG = Run(steps=400)
SHORT = Run(steps=160)
MOVED = {"commits": NUM_LAYERS}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as pool:
        yield pool


def check_served_right(results: list[RunResult]) -> None:
    """No token was served by a wrong expert, and all ranks ended with one map."""
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    for result in results[1:]:
        np.testing.assert_array_equal(result.physical_to_logical, results[0].physical_to_logical)


def test_dynamic_balancing_raises_balancedness_and_serves_every_token_right(ranks: RankPool) -> None:
    """The same passes with the first map and with the one that was planned for them."""
    run = Run(steps=0, until={"cycles": 3, **MOVED}, steps_after=100, steps_per_topic=10**6)
    results = ranks.run(serve, run)
    check_served_right(results)
    assert results[0].stats["failed_cycles"] == 0, results[0].stats["last_error"]
    still = replace(run, steps=results[0].steps_served, until={}).on(dynamic_eplb=False)
    gain = [
        moving.balancedness[-100:] - first.balancedness[-100:]
        for moving, first in zip(results, ranks.run(serve, still), strict=True)
    ]
    assert np.mean(gain) > 0.1


def test_experts_follow_the_traffic_as_its_kind_changes(ranks: RankPool) -> None:
    results = ranks.run(serve, replace(LONG, until={"cycles": 3, **MOVED}))
    check_served_right(results)
    assert all(result.stats["cycles"] >= 3 and result.stats["commits"] >= NUM_LAYERS for result in results)
    assert results[0].stats["failed_cycles"] == 0, results[0].stats["last_error"]


def test_the_forward_thread_calls_no_collective_but_the_models_own(ranks: RankPool) -> None:
    for result in ranks.run(serve, replace(SHORT, until=MOVED)):
        assert result.stats["commits"] >= NUM_LAYERS
        assert result.group_calls_on_forward_thread == 0
        assert result.model_collectives == result.steps_served


def test_maps_changed_without_their_weights_are_seen(ranks: RankPool) -> None:
    results = ranks.run(serve, replace(SHORT, action="change_maps_only").on(dynamic_eplb=False))
    assert all(result.first_wrong_step == 10 for result in results)


def test_one_rank_committing_a_step_late_is_seen(ranks: RankPool) -> None:
    results = ranks.run(serve, replace(SHORT, action="commit_late_on_rank_1", until={"commits": 1}))
    assert sum(result.wrong_tokens for result in results) > 0


@pytest.mark.parametrize("fault_ranks", [(0,), (2,), (0, 1, 2, 3)], ids=["rank 0", "rank 2", "all ranks"])
@pytest.mark.parametrize(
    "stage", [stage for stage in Stage if stage not in (Stage.REBUILD, Stage.TRACE, Stage.RECORD)]
)
def test_a_fault_in_any_stage_ends_the_cycle_and_the_next_one_succeeds(
    ranks: RankPool, stage: Stage, fault_ranks: tuple[int, ...]
) -> None:
    until = {"failed_cycles": 1, "cycles": 1}
    results = ranks.run(serve, replace(SHORT, fault_stage=str(stage), fault_ranks=fault_ranks, until=until))
    check_served_right(results)
    for result in results:
        assert result.stats["failed_cycles"] >= 1
        assert result.stats["cycles"] >= 1
        assert result.stats["last_success_step"] is not None
        assert f"injected in {stage}" in str(result.stats["last_error"])


def test_a_fault_while_the_group_is_rebuilt_is_survived_too(ranks: RankPool) -> None:
    """The first fault breaks the group inside a transfer; no fault can be injected before that."""
    run = replace(
        SHORT,
        fault_stage="rebuild",
        fault_ranks=(1,),
        action="break_the_group",
        step_s=0.01,
        until={"failed_cycles": 2, "cycles": 1},
    )
    results = ranks.run(serve, run.on(transfer_timeout_s=3.0))
    check_served_right(results)
    for result in results:
        assert result.stats["failed_cycles"] >= 2
        assert result.stats["cycles"] >= 1


@pytest.mark.parametrize(
    "stage", [stage for stage in Stage if stage not in (Stage.REBUILD, Stage.TRACE, Stage.RECORD)]
)
def test_it_closes_cleanly_from_any_stage(ranks: RankPool, stage: Stage) -> None:
    results = ranks.run(serve, replace(SHORT, stop_in_stage=str(stage)))
    check_served_right(results)
    assert stage in results[0].stages
    for result in results:
        assert result.state_after_close == "closed"
        assert result.threads_left == []
        assert result.stats["failed_cycles"] == 0, result.stats["last_error"]


def test_paused_it_moves_nothing_and_resumed_it_goes_on(ranks: RankPool) -> None:
    results = ranks.run(serve, replace(LONG, action="pause_early_and_resume", until=MOVED))
    check_served_right(results)
    assert all(result.stats["commits"] >= NUM_LAYERS for result in results)


def test_pausing_at_any_moment_never_mixes_two_cycles(ranks: RankPool) -> None:
    run = replace(LONG, action="pause_and_resume_often", until={"cancelled_cycles": 3}).on(
        expert_heat_collection_interval=1
    )
    results = ranks.run(serve, run)
    check_served_right(results)
    assert all(result.stats["cancelled_cycles"] >= 3 for result in results)
    assert all(result.stats["failed_cycles"] == 0 for result in results), results[0].stats["last_error"]


def test_rebalance_now_does_not_wait_for_the_interval(ranks: RankPool) -> None:
    interval = 1000
    run = replace(SHORT, action="ask_for_a_cycle", until={"commits": 1}, step_s=0.02)
    run = run.on(expert_heat_collection_interval=interval, load_windows=interval)
    results = ranks.run(serve, run)
    check_served_right(results)
    assert all(int(result.stats["first_commit_step"] or interval) < interval for result in results)


@pytest.mark.parametrize("interval", [1, 2])
def test_the_shortest_intervals_do_not_hang(ranks: RankPool, interval: int) -> None:
    results = ranks.run(
        serve, replace(SHORT, until={"cycles": 1}).on(expert_heat_collection_interval=interval)
    )
    check_served_right(results)
    assert all(result.stats["cycles"] >= 1 for result in results)


@pytest.mark.parametrize("layers", [2, 100])
def test_several_layers_commit_together(ranks: RankPool, layers: int) -> None:
    results = ranks.run(
        serve, replace(SHORT, until={"commits": 1}).on(layer_updates_per_step=layers, verify_transfers=True)
    )
    check_served_right(results)
    assert all(result.stats["commits"] >= 1 for result in results)


def test_staging_for_one_expert_is_enough_to_move_all_of_them(ranks: RankPool) -> None:
    results = ranks.run(serve, replace(LONG, until={"commits": NUM_LAYERS + 1}).on(staging_memory_mb=0.00005))
    check_served_right(results)
    assert all(result.stats["commits"] > NUM_LAYERS for result in results)
    assert all(0 < int(result.stats["staging_bytes"] or 0) <= 50 for result in results)


def test_recording_observes_plans_and_moves_nothing(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "map.json"
    run = replace(SHORT, until={"records_written": 1})
    results = ranks.run(serve, run.on(dynamic_eplb=False, expert_map_record_path=str(path)))
    check_served_right(results)
    recorded = ExpertMap.load(path)
    assert all(result.stats["commits"] == 0 for result in results)
    assert results[0].stats["records_written"] >= 1
    assert not np.array_equal(recorded.physical_to_logical, results[0].physical_to_logical)
    assert results[0].stats["staging_bytes"] == 0


def test_a_record_that_cannot_be_written_fails_no_cycle(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "a file, not a folder"
    path.write_text("")
    run = replace(SHORT, until={"failed_records": 1, **MOVED})
    results = ranks.run(serve, run.on(expert_map_record_path=str(path / "map.json")))
    check_served_right(results)
    assert results[0].stats["failed_records"] >= 1
    assert results[0].stats["failed_cycles"] == 0


def test_dynamic_balancing_records_the_map_in_force(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    results = ranks.run(serve, replace(SHORT, until=MOVED).on(expert_map_record_path=str(path)))
    assert results[0].stats["records_written"] >= 1
    assert ExpertMap.load(path).num_layers == NUM_LAYERS


def test_observing_alone_plans_nothing_and_knows_the_balancedness(ranks: RankPool) -> None:
    results = ranks.run(
        serve, replace(SHORT, until={"cycles": 1}).on(dynamic_eplb=False, log_balancedness=True)
    )
    check_served_right(results)
    assert results[0].stats["cycles"] >= 1
    assert 0.0 < float(results[0].stats["balancedness"] or 0.0) < 1.0
    assert all("plan" not in result.stages for result in results)
