"""`vllm serve` on four ranks with vLLM's defaults (compiled), over HTTP, watched through /metrics."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from eplb_platform.balance import balancedness, rank_load
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import load_trace
from eplb_platform.topology import Topology
from tests.vllm.conftest import PROMPTS, REPOSITORY, TOKENS, Models, Tokens
from tests.vllm.process_session import free_port
from tests.vllm.server import Server
from tests.vllm.snapshots import PATIENCE_S
from tests.vllm.traffic import prompts

EXPERTS = 64
SHIFTS = (("python", "c"), ("json", "table"), ("markup",))
RATIO, COMMITS = "eplb_load_balance_ratio", "eplb_commits_total"


@pytest.fixture(scope="module")
def trace(folder: Path) -> Path:
    return folder / "trace.safetensors"


@pytest.fixture(scope="module")
def server(models: Models, folder: Path, trace: Path) -> Iterator[Server]:
    script = str(REPOSITORY / "examples" / "vllm" / "serve.sh")
    eplb = {
        "dynamic_eplb": True,
        "num_redundant_experts": 16,
        "expert_heat_collection_interval": 24,
        "algorithm_execution_interval": 2,
        "layer_updates_per_step": 4,
        "trace_record_path": str(trace),
    }
    options = ["--port", "{port}", "--tensor-parallel-size", "4", "--shutdown-timeout", "30"]
    options += ["--additional-config", json.dumps({"eplb_config": eplb})]
    environment = {"PYTHON": sys.executable, "MODEL": str(models.demo), "VLLM_PORT": str(free_port())}
    with Server([script, *options], folder / "server.log", **environment) as server:
        yield server


def value(server: Server, name: str, *labels: str) -> float:
    """The only sample of a metric, or the only one with these labels."""
    samples = {
        sample: value
        for sample, value in server.metrics().items()
        if re.split(r"[{ ]", sample)[0] == name and all(label in sample for label in labels)
    }
    assert len(samples) == 1, samples
    return next(iter(samples.values()))


def test_tokens_are_those_without_balancing(server: Server, unbalanced: Tokens) -> None:
    for _ in range(2):
        assert server.generate(PROMPTS, TOKENS) == unbalanced


def test_text_is_completed(server: Server) -> None:
    answer = server.post("/v1/completions", model="tiny", prompt="def ", max_tokens=8, temperature=0.0)
    assert len(answer["choices"][0]["text"]) == 8


@dataclass(frozen=True)
class Round:
    """Prompts of some kinds of text, the steps that served them, and the map in force when they came."""

    kinds: tuple[str, ...]
    steps: slice
    expert_map: ExpertMap


def now(server: Server) -> tuple[int, ExpertMap]:
    """Steps taken so far, and the map in force."""
    (status,) = server.snapshots()[0]["models"].values()
    return status["steps"], ExpertMap(status["physical_to_logical"], EXPERTS, Topology(4))


@pytest.fixture(scope="module")
def rounds(server: Server) -> list[Round]:
    """Traffic whose kind changes twice: each kind until maps were planned for it, and then once more."""
    served = []
    for shift, kinds in enumerate(SHIFTS):
        end = value(server, COMMITS) + 3
        started = time.monotonic()
        for seed in itertools.count():
            start, expert_map = now(server)
            is_last = value(server, COMMITS) >= end
            assert is_last or time.monotonic() - started < PATIENCE_S, "maps are planned no more"
            server.generate(prompts(kinds, 16, seed=100 * shift + seed), TOKENS)
            served.append(Round(kinds, slice(start, now(server)[0]), expert_map))
            if is_last:
                break
    return served


def test_tokens_are_the_same_after_the_traffic_changed(
    server: Server, rounds: list[Round], unbalanced: Tokens
) -> None:
    assert {round_.kinds for round_ in rounds} == set(SHIFTS)
    assert server.generate(PROMPTS, TOKENS) == unbalanced


def test_metrics_tell_what_was_done(server: Server) -> None:
    assert value(server, "eplb_cycles_total", 'outcome="moved"') >= 3
    assert value(server, "eplb_cycles_total", 'outcome="failed"') == 0
    assert value(server, "eplb_moved_experts_total") > 0
    assert 0 < value(server, RATIO) <= 1
    for rank in range(4):
        assert value(server, "eplb_alive", f'rank="{rank}"') == 1
        assert value(server, "eplb_received_bytes_total", f'rank="{rank}"') > 0
    assert value(server, "vllm:generation_tokens_total") > 0
    ranks = server.snapshots()
    assert [rank["rank"] for rank in ranks] == [0, 1, 2, 3]
    assert len({str(rank["physical_to_logical"]) for rank in ranks}) <= 2


def test_server_leaves_when_told(server: Server) -> None:
    server.process.popen.terminate()
    assert server.process.popen.wait(300) is not None
    assert server.process.wait_until_gone(60) == {}


def test_maps_fit_the_traffic_that_they_were_planned_for(rounds: list[Round], trace: Path) -> None:
    """Each kind of text has hot experts of its own: on the last of it, the map planned while it was served is
    better balanced than the one before it. Both are judged on the same tokens, those of the recorded trace,
    since how requests fall into batches, and with it the balance of a window, is never the same twice."""
    load = np.asarray(load_trace.read(trace).expert_load)
    gained = []
    for kinds in SHIFTS:
        first, *_, last = (round_ for round_ in rounds if round_.kinds == kinds)
        tokens = load[last.steps].sum(axis=0)
        before, after = (balancedness(rank_load(of.expert_map, tokens)).mean() for of in (first, last))
        gained.append(after - before)
    assert min(gained) > 0.02 and np.mean(gained) > 0.05, gained
