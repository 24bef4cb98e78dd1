"""Two ranks that rearrange while they serve: the tokens stay, everything else is told as it is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import compute_cost, load_trace
from tests.vllm.conftest import PROMPTS, TOKENS, Models, Tokens
from tests.vllm.engine import Engine, EngineFailed
from tests.vllm.snapshots import (
    PATIENCE_S,
    is_idle,
    layouts,
    of_ranks,
    serve_until,
    serve_until_idle,
    statuses,
)

REDUNDANT = 8
LAYERS, EXPERTS, TOP_K = 4, 64, 4


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Path:
    return folder / "expert_map.json"


@pytest.fixture(scope="module")
def trace(folder: Path) -> Path:
    return folder / "trace.safetensors"


@pytest.fixture(scope="module")
def engine(models: Models, folder: Path, recorded: Path, trace: Path) -> Iterator[Engine]:
    eplb = {
        "dynamic_eplb": True,
        "num_redundant_experts": REDUNDANT,
        "expert_heat_collection_interval": 16,
        "algorithm_execution_interval": 2,
        "expert_map_record_path": str(recorded),
        "trace_record_path": str(trace),
        "verify_transfers": True,
        "log_balancedness": True,
        "log_balancedness_interval": 10,
        "enable_expert_compute_profiling": True,
        "expert_compute_profiling_warmup_steps": 2,
        "compute_cost_record_path": str(folder / "cost.json"),
    }
    with Engine(models.demo, folder / "engine.log", tensor_parallel_size=2, eplb=eplb) as engine:
        yield engine


def test_a_map_is_recorded_before_the_first_request(engine: Engine, recorded: Path) -> None:
    assert ExpertMap.load(recorded).physical_to_logical.tolist() == layouts(engine)[0]
    assert statuses(engine)[0]["cycles"] == 0


def test_all_that_layers_keep_for_an_expert_moves(engine: Engine) -> None:
    """Nothing is refused and nothing doubted in the layers that vLLM has prepared for its kernels."""
    tensors = engine.rpc("probe_layer_tensors")
    assert tensors == [[["w13_weight", "w2_weight"]] * LAYERS] * 2
    assert "not moved with the experts" not in engine.process.log.read_text(errors="replace")


def test_tokens_stay_while_experts_move(engine: Engine, unbalanced: Tokens) -> None:
    serve_until(
        engine,
        lambda status: status["cycles"] >= 3 and status["moved_experts"] > 0,
        lambda: check_tokens(engine, unbalanced),
    )
    for status in statuses(engine):
        assert status["failed_cycles"] == 0, status["last_error"]


def test_kernels_are_timed_and_taken_apart(engine: Engine, folder: Path) -> None:
    """One time for all experts of a layer, in which nearly every expert of this load had tokens."""
    pause(engine)
    for status in statuses(engine):
        assert status["profiled_passes"] > 10 and status["profiled_experts"] > 0.9
        assert status["profiling_s"] > 0 and status["expert_compute_s"] > 0
        assert status["compute_cost_residual"] >= 0
    assert 0 < statuses(engine)[0]["time_balancedness"] <= 1  # where the plans are made
    cost = compute_cost.read(folder / "cost.json")
    assert cost.shape == (LAYERS, EXPERTS) and np.isfinite(cost).mean() > 0.9
    engine.rpc("eplb_stop_profiling")
    first, second = engine.rpc("eplb_compute_statistics")
    (model,) = first
    assert first[model]["profiling_enabled"] is False
    assert first[model]["layers"] == second[model]["layers"]
    assert first[model]["layers"]["layer_0"]["expert_0"]["avg_time_per_token_ms"] >= 0
    engine.rpc("eplb_resume")


def test_moved_experts_are_the_same_everywhere(engine: Engine) -> None:
    pause(engine)
    ranks = of_ranks(engine)
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert {rank["moved_experts"] for rank in ranks} == {ranks[0]["moved_experts"]}
    first, second = layouts(engine)
    assert first == second
    assert [status["physical_to_logical"] for status in statuses(engine)] == [first, second]
    engine.rpc("eplb_resume")


def test_paused_engine_moves_nothing_until_it_is_resumed(engine: Engine, unbalanced: Tokens) -> None:
    pause(engine)
    before = statuses(engine)[0]
    assert before["state"] == "paused"
    assert engine.generate(PROMPTS, TOKENS).tokens == unbalanced
    after = statuses(engine)[0]
    assert after["steps"] > before["steps"] + 16
    assert (after["commits"], after["cycles"]) == (before["commits"], before["cycles"])
    engine.rpc("eplb_resume")
    serve_until_a_cycle_ends(engine, after, unbalanced)


def test_recorded_map_is_complete_and_was_in_force(engine: Engine, recorded: Path) -> None:
    expert_map = ExpertMap.load(recorded)
    assert expert_map.physical_to_logical.shape == (LAYERS, EXPERTS + REDUNDANT)
    assert expert_map.topology.num_ranks == 2
    assert expert_map.physical_to_logical.tolist() != initial_layout()


def test_balancedness_is_logged_as_vllm_does(engine: Engine) -> None:
    log = engine.process.log.read_text(errors="replace")
    assert "balancedness" in log


def test_sleep_stops_the_balancer_and_waking_starts_it(engine: Engine, unbalanced: Tokens) -> None:
    engine.rpc("sleep")
    asleep = statuses(engine)
    assert {status["state"] for status in asleep} == {"paused"}
    engine.rpc("wake_up")
    serve_until_a_cycle_ends(engine, asleep[0], unbalanced)


def test_reloading_weights_is_refused_in_words(engine: Engine, unbalanced: Tokens) -> None:
    """On a CPU vLLM itself spoils the experts of a model that it loads a second time."""
    before = layouts(engine)
    assert before[0] != initial_layout()
    with pytest.raises(EngineFailed, match="reload_weights"):
        engine.rpc("reload_weights")
    assert engine.generate(PROMPTS, TOKENS).tokens == unbalanced
    assert statuses(engine)[0]["failed_cycles"] == 0


def test_rebalance_now_starts_a_cycle_at_once(engine: Engine) -> None:
    """The interval is sixteen steps; of three forward passes one begins a cycle that was asked for."""

    def serve_a_pass() -> None:
        engine.generate(PROMPTS[:1], 1)
        time.sleep(0.2)  # a cycle gets on with what needs no passes, and ends before the next is due

    serve_until(engine, lambda status: is_idle(status) and 3 < status["next_cycle_steps"] < 12, serve_a_pass)
    engine.rpc("eplb_rebalance_now")
    engine.generate(PROMPTS[:1], 3)
    for status in statuses(engine):
        assert status["next_cycle_steps"] >= 12


def test_trace_holds_the_tokens_of_every_step(engine: Engine, trace: Path) -> None:
    pause(engine)
    recorded_trace = load_trace.read(trace)
    load = np.asarray(recorded_trace.expert_load)
    assert load.shape[1:] == (LAYERS, EXPERTS)
    per_layer = load.sum(axis=2)
    assert (per_layer == per_layer[:, :1]).all()
    # A prompt of 48 tokens is 48 choices of top-k; a decode step of n sequences is n.
    assert (per_layer % TOP_K == 0).all()
    decode = per_layer[np.asarray(recorded_trace.phase) == 1, 0] // TOP_K
    assert len(decode) and set(decode.tolist()) <= set(range(1, 9))


def test_killed_worker_in_a_transfer(engine: Engine, recorded: Path, folder: Path) -> None:
    """vLLM says so, nothing is left, and the record can be read."""
    fetching = folder / "fetching"
    engine.rpc("probe_stop_at_fetch", str(fetching))
    engine.rpc("eplb_resume")
    engine.rpc("eplb_rebalance_now")
    engine.send_generate(PROMPTS * 16, 200)
    deadline = time.monotonic() + PATIENCE_S
    while not fetching.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fetching.exists(), engine.process.log_tail()
    os.kill(engine.process.workers()[1], signal.SIGKILL)
    fetching.unlink()
    with pytest.raises(EngineFailed, match="Engine"):
        engine.receive_generated()
    engine.process.popen.terminate()
    assert engine.leave() == {}
    assert ExpertMap.load(recorded).physical_to_logical.shape == (LAYERS, EXPERTS + REDUNDANT)


def initial_layout() -> list[list[int]]:
    """vLLM's: the experts in order, the redundant ones from the first on."""
    return [[slot % EXPERTS for slot in range(EXPERTS + REDUNDANT)]] * LAYERS


def check_tokens(engine: Engine, expected: Tokens) -> None:
    assert engine.generate(PROMPTS, TOKENS).tokens == expected


def serve_until_a_cycle_ends(engine: Engine, before: dict[str, Any], expected: Tokens) -> None:
    """One more than there were before."""
    serve_until(
        engine,
        lambda status: status["cycles"] > before["cycles"],
        lambda: check_tokens(engine, expected),
    )


def pause(engine: Engine) -> None:
    """Nothing is under way afterwards."""
    engine.rpc("eplb_pause")
    serve_until_idle(engine, PROMPTS[:2])
