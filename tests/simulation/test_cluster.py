"""The simulated cluster: what it promises of itself, and what it has found."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from eplb_platform.algorithms import rebalance_experts
from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime import Stage
from eplb_platform.testing.cluster import FaultPlan, Scenario, Tally, draw_scenario, simulate
from eplb_platform.testing.cluster.scenario import TIMEOUT_S
from eplb_platform.topology import Topology

CALM = Scenario(
    seed=1,
    num_ranks=8,
    num_layers=2,
    slots_per_rank=3,
    num_redundant=4,
    num_nodes=2,
    config=EplbConfig(
        dynamic_eplb=True,
        expert_map_record_path="map.json",
        expert_heat_collection_interval=4,
        algorithm_execution_interval=0,
        load_windows=2,
        transfer_timeout_s=TIMEOUT_S,
        verify_transfers=True,
    ),
    quiet_step=24,
)


def configured(**keys: object) -> EplbConfig:
    return EplbConfig(**{**CALM.config.model_dump(), **keys})


def test_equal_seeds_give_equal_runs_and_different_seeds_different_ones() -> None:
    first, again, other = (simulate(replace(CALM, seed=seed), keep_trace=True) for seed in (3, 3, 4))
    assert first.trace == again.trace
    assert first.events == again.events
    assert first.trace != other.trace


def test_a_calm_cluster_moves_experts_and_waits_for_nothing() -> None:
    result = simulate(CALM)
    assert result.violations == []
    assert result.commits >= 4
    assert result.cycles["failed"] == 0
    assert not result.injected


@pytest.mark.parametrize("device_group", [False, True])
def test_a_flipped_bit_is_caught_and_the_next_cycle_succeeds(device_group: bool) -> None:
    fault = FaultPlan("transfer corrupted", 2, 3)
    flipped = replace(CALM, seed=3, faults=(fault,), device_group=device_group)
    result = simulate(flipped)
    assert result.violations == []
    assert result.injected["transfer corrupted"] == 1
    assert result.cycles["failed"] == CALM.num_ranks
    assert result.recovered


def test_a_flipped_bit_that_nobody_looks_for_is_seen_as_a_wrong_token() -> None:
    unverified = configured(verify_transfers=False)
    result = simulate(replace(CALM, config=unverified, faults=(FaultPlan("transfer corrupted", 2, 3),)))
    assert "wrong token" in result.violations[0]
    tally = Tally()
    tally.add(result)
    assert tally.wrong_tokens == 1
    assert any(result.replay in line for line in tally.lines())


def test_a_cycle_that_fails_after_its_commit_was_agreed_waits_for_it() -> None:
    """The next cycle would else start from a map that is about to change."""
    config = configured(commit_margin_steps=12)
    faults = tuple(FaultPlan("exception in a stage", rank, 3, Stage.COMMIT) for rank in range(CALM.num_ranks))
    result = simulate(replace(CALM, config=config, faults=faults, quiet_step=60))
    assert result.violations == []
    assert result.injected["exception in a stage"] == CALM.num_ranks
    assert result.recovered


@pytest.mark.parametrize(
    "different",
    [
        {"layer_updates_per_step": 2},
        {"verify_transfers": False},
        {"expert_heat_collection_interval": 7},
        {"dynamic_eplb": False},
    ],
)
def test_a_rank_that_is_configured_differently_serves_nothing(different: dict[str, object]) -> None:
    result = simulate(replace(CALM, different_config=different, odd_rank=5))
    assert result.violations == []
    assert result.passes == 0


def test_where_a_rank_keeps_its_files_may_differ() -> None:
    result = simulate(
        replace(CALM, different_config={"expert_map_record_path": "elsewhere.json"}, odd_rank=5)
    )
    assert result.passes > 0


@pytest.mark.parametrize("kind", ["drain", "invalidate"])
def test_a_planner_that_never_answers_holds_up_no_meeting(kind: str) -> None:
    faults = (FaultPlan("planner never answers", 0, 3), *(FaultPlan(kind, 0, step) for step in (6, 9, 12)))
    result = simulate(replace(CALM, faults=faults))
    assert result.violations == []
    assert result.injected[kind] == 3
    assert result.injected["planner never answers"] == 1


@pytest.mark.parametrize("kind", ["rank frozen", "clock jump"])
@pytest.mark.parametrize("stage", [Stage.FETCH, Stage.AGREE, Stage.COMMIT])
def test_a_process_that_was_stopped_for_long_serves_on(kind: str, stage: Stage) -> None:
    for seed in range(4):
        result = simulate(replace(CALM, seed=seed, faults=(FaultPlan(kind, 3, 3, stage),)))
        assert result.violations == []
        assert result.recovered


@pytest.mark.parametrize("stage", [Stage.START, Stage.COLLECT, Stage.FETCH, Stage.AGREE])
def test_a_rank_that_could_not_tell_of_its_failure_does_so_later(stage: Stage) -> None:
    """The others would else wait for it for ever, where no time-out ends a wait."""
    for seed in range(4):
        result = simulate(replace(CALM, seed=seed, faults=(FaultPlan("store gone", 6, 3, stage),)))
        assert result.violations == []


def test_a_record_that_fails_behind_a_cycle_that_ended_early_fails_nothing_else() -> None:
    """A rank shuts down when some chunks are committed, and their map is recorded all the same."""
    faults = (
        FaultPlan("exception in a stage of all ranks", 6, 3, Stage.RECORD),
        FaultPlan("shutdown", 7, 9, None),
    )
    for seed in range(3):
        assert simulate(replace(CALM, seed=seed, uneven_steps=0.9, faults=faults)).violations == []


@pytest.mark.parametrize("tolerates", [False, True])
def test_when_a_rank_dies_the_others_serve_on_or_all_end(tolerates: bool) -> None:
    death = FaultPlan("rank dead", 4, 3, Stage.COMMIT)
    result = simulate(replace(CALM, faults=(death,), tolerates_death=tolerates, keeps_files=True))
    assert result.violations == []
    assert (result.passes > CALM.quiet_step) == tolerates


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_seeds_of_every_kind_keep_every_rule(first: int) -> None:
    for seed in range(first, first + 10):
        assert simulate(draw_scenario(seed, 8)).violations == [], f"seed {seed}"


def test_the_command_replays_a_seed() -> None:
    command = [
        sys.executable,
        "-m",
        "eplb_platform.testing.cluster",
        "--seed",
        "3",
        "--ranks",
        "8",
        "--trace",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "commit 0 after pass" in shown
    assert "wrong tokens: 0" in shown


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (FaultPlan("rank ded", 0, 3), "fault 'rank ded': unknown, meant 'rank dead'"),
        (FaultPlan("rank frozen", 8, 3), r"rank frozen \(rank 8, .*\): expected a rank from 0 to 7"),
        (FaultPlan("ranks leave", 0, 3), "expected resizes=True"),
        (FaultPlan("rank frozen", 0, 0), "expected a pass from 1 to quiet_step - 1, 23"),
        (FaultPlan("rank frozen", 0, 24), "expected a pass from 1"),
        (FaultPlan("rank frozen", 0, 3, "ftech"), "expected a stage of start, rebuild"),
        (FaultPlan("exception in a stage", 0, 3), "expected a stage$"),
    ],
)
def test_a_fault_that_cannot_come_is_refused(fault: FaultPlan, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(CALM, faults=(fault,))


def maps_of_one_s_own(count: int) -> list[ExpertMap]:
    """Each planned anew, so that nearly every slot changes."""
    draw = np.random.default_rng(0)
    load = [draw.zipf(1.5, (CALM.num_layers, CALM.num_logical)).clip(1, 99) for _ in range(count)]
    slots = CALM.num_ranks * CALM.slots_per_rank
    return [
        rebalance_experts(one, num_physical_experts=slots, topology=CALM.topology).expert_map for one in load
    ]


@pytest.mark.parametrize("faults", [(), (FaultPlan("rank frozen", 3, 5, Stage.COMMIT),)])
def test_maps_of_one_s_own_are_served(faults: tuple[FaultPlan, ...]) -> None:
    initial, *planned = maps_of_one_s_own(3)
    result = simulate(replace(CALM, initial_map=initial, planned_maps=tuple(planned), faults=faults))
    assert result.violations == []
    assert result.maps_in_force >= {initial.digest(), planned[0].digest()}
    assert faults or planned[1].digest() in result.maps_in_force


def test_a_map_of_another_cluster_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^initial_map: layers, experts and slots are .* expected \(2, 20, 24\)"
    ):
        replace(CALM, initial_map=ExpertMap.initial(1, 20, CALM.topology, 4))
    with pytest.raises(ValueError, match=r"^planned_maps: its topology is "):
        replace(CALM, planned_maps=(ExpertMap.initial(2, 20, Topology(4), 4),))
