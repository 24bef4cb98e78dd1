"""Two ranks that start from a recorded map and go on from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eplb_platform.expert_map import ExpertMap
from tests.vllm.conftest import PROMPTS, TOKENS, Models, Recording, Tokens
from tests.vllm.engine import Engine
from tests.vllm.snapshots import layouts, serve_until, statuses


@pytest.fixture(scope="module")
def deployed(recording: Recording) -> Path:
    return recording.last


@pytest.fixture(scope="module")
def engine(models: Models, folder: Path, deployed: Path) -> Iterator[Engine]:
    eplb = {
        "expert_map_path": str(deployed),
        "dynamic_eplb": True,
        "expert_heat_collection_interval": 12,
        "algorithm_execution_interval": 0,
        "layer_updates_per_step": 4,
        "eplb_policy_type": 1,
    }
    with Engine(models.demo, folder / "engine.log", tensor_parallel_size=2, eplb=eplb) as engine:
        yield engine


def test_map_is_where_it_starts_from(engine: Engine, deployed: Path) -> None:
    assert layouts(engine) == [ExpertMap.load(deployed).physical_to_logical.tolist()] * 2


def test_tokens_stay_while_experts_move(engine: Engine, deployed: Path, unbalanced: Tokens) -> None:
    def serve() -> None:
        assert engine.generate(PROMPTS, TOKENS).tokens == unbalanced

    serve_until(engine, lambda status: status["cycles"] >= 3 and status["moved_experts"] > 0, serve)
    status = statuses(engine)[0]
    assert status["failed_cycles"] == 0, status["last_error"]
    assert layouts(engine)[0] != ExpertMap.load(deployed).physical_to_logical.tolist()
