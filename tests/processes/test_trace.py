"""The load trace that is recorded while serving, against what the tokens were really routed to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eplb_platform.records import load_trace
from eplb_platform.testing.processes import RankPool
from tests.processes.serve_tagged import Run, phase_of, serve
from tests.processes.tagged_model import NUM_EXPERTS, NUM_LAYERS, route

pytestmark = pytest.mark.processes

NUM_RANKS = 4
DUMMY_STEPS = (0, 30, 31)
RUN = Run(steps=200, dummy_steps=DUMMY_STEPS, rank_1_dummy_steps=(5, 40))
MOVED = {"commits": NUM_LAYERS}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as pool:
        yield pool


def routed(step: int) -> NDArray[np.int64]:
    """[layers, logical], tokens of all ranks that are no dummies."""
    load = np.zeros((NUM_LAYERS, NUM_EXPERTS), dtype=np.int64)
    for rank in range(NUM_RANKS):
        if rank == 1 and step in RUN.rank_1_dummy_steps:
            continue
        for layer in range(NUM_LAYERS):
            load[layer] += np.bincount(route(step, rank, layer).numpy().ravel(), minlength=NUM_EXPERTS)
    return load


def check_trace(path: Path, steps: range) -> int:
    """The trace has the first of `steps`, dummies left out, and their true load; returns how many."""
    trace = load_trace.read(path)
    expected = [step for step in steps if step not in DUMMY_STEPS][: trace.num_steps]
    np.testing.assert_array_equal(trace.expert_load, [routed(step) for step in expected])
    assert trace.phase.tolist() == [phase_of(step) for step in expected]
    assert trace.metadata["model"] == "tagged"
    return trace.num_steps


@pytest.mark.parametrize(
    "config",
    [{"dynamic_eplb": False}, {"dynamic_eplb": False, "expert_map_record_path": "map.json"}, {}],
    ids=["alone", "with a recorded map", "while experts move"],
)
def test_the_trace_shows_what_tokens_were_routed_to(
    ranks: RankPool, tmp_path: Path, config: dict[str, object]
) -> None:
    path = tmp_path / "new" / "trace.safetensors"
    config = {
        key: str(tmp_path / value) if isinstance(value, str) else value for key, value in config.items()
    }
    until = {"trace_steps": RUN.steps // 4, **({} if "dynamic_eplb" in config else MOVED)}
    results = ranks.run(serve, replace(RUN, until=until).on(trace_record_path=str(path), **config))
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    steps = check_trace(path, range(results[0].steps_served))
    assert steps >= RUN.steps // 4
    assert [result.stats["trace_steps"] for result in results] == [steps, None, None, None]
    assert results[0].stats["failed_cycles"] == 0, results[0].stats["last_error"]
    if "dynamic_eplb" not in config:
        assert int(results[0].stats["commits"] or 0) >= NUM_LAYERS
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["trace.safetensors"]


def test_only_the_range_is_traced(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    run = replace(RUN, until={"trace_steps": 33})
    ranks.run(serve, run.on(trace_record_path=str(path), trace_record_range="25-60"))
    assert check_trace(path, range(25, 60)) == 33


def test_the_file_is_valid_when_a_rank_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    with RankPool(NUM_RANKS, timeout_s=300.0) as pool:
        run = replace(RUN, action="die_late", until={"trace_steps": RUN.steps}).on(
            trace_record_path=str(path)
        )
        outcomes = pool.outcomes(serve, run)
    assert outcomes[0].error is not None
    assert check_trace(path, range(10_000)) >= 1


def test_a_trace_that_cannot_be_written_ends_nothing(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "a file, not a folder"
    path.write_text("")
    run = replace(RUN, until={"failed_records": 2, **MOVED})
    results = ranks.run(serve, run.on(trace_record_path=str(path / "trace.safetensors")))
    assert [result.wrong_tokens for result in results] == [0] * NUM_RANKS
    assert results[0].stats["failed_cycles"] == 0
    assert int(results[0].stats["failed_records"] or 0) >= 2
    assert "trace.safetensors" in str(results[0].stats["last_error"])
    assert int(results[0].stats["commits"] or 0) >= NUM_LAYERS
