"""Two ranks that serve with the recorded map: nothing moves, and only the right weights give the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eplb_platform.expert_map import ExpertMap
from tests.vllm.conftest import PROMPTS, TOKENS, Models, Recording, Tokens
from tests.vllm.engine import Engine
from tests.vllm.snapshots import layouts, statuses


@pytest.fixture(scope="module")
def deployed(recording: Recording) -> Path:
    return recording.last


@pytest.fixture(scope="module")
def engine(models: Models, folder: Path, deployed: Path) -> Iterator[Engine]:
    eplb = {"expert_map_path": str(deployed)}
    with Engine(models.demo, folder / "engine.log", tensor_parallel_size=2, eplb=eplb) as engine:
        yield engine


def test_map_is_in_force_before_the_first_request(engine: Engine, deployed: Path) -> None:
    assert layouts(engine) == [ExpertMap.load(deployed).physical_to_logical.tolist()] * 2


def test_tokens_are_those_without_balancing_and_nothing_moves(
    engine: Engine, deployed: Path, unbalanced: Tokens
) -> None:
    for _ in range(3):
        assert engine.generate(PROMPTS, TOKENS).tokens == unbalanced
    for status in statuses(engine):
        assert (status["cycles"], status["commits"], status["moved_experts"]) == (0, 0, 0)
    assert layouts(engine) == [ExpertMap.load(deployed).physical_to_logical.tolist()] * 2


def test_tokens_differ_when_weights_do_not_follow_the_map(engine: Engine, unbalanced: Tokens) -> None:
    """The comparison of tokens that all tests here make is able to fail."""
    assert all(changed > 0 for changed in engine.rpc("probe_misroute"))
    assert engine.generate(PROMPTS, TOKENS).tokens != unbalanced


def test_engine_leaves_by_itself(engine: Engine) -> None:
    assert engine.leave() == {}
