"""`vllm serve` on four ranks with vLLM's defaults (compiled), over HTTP, watched through /metrics."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.conftest import PROMPTS, REPOSITORY, TOKENS, Models, Tokens
from tests.vllm.server import Server
from tests.vllm.traffic import prompts

EPLB = """{"eplb_config": {"dynamic_eplb": true, "num_redundant_experts": 16,
  "expert_heat_collection_interval": 24, "algorithm_execution_interval": 2, "layer_updates_per_step": 4}}"""
RATIO = "eplb_load_balance_ratio"


@pytest.fixture(scope="module")
def server(models: Models, folder: Path) -> Iterator[Server]:
    script = str(REPOSITORY / "examples" / "vllm" / "serve.sh")
    options = ["--port", "{port}", "--tensor-parallel-size", "4", "--additional-config", EPLB]
    environment = {"PYTHON": sys.executable, "MODEL": str(models.demo)}
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


def ratios_until(server: Server, kinds: tuple[str, ...], cycles: int, seed: int) -> list[float]:
    """Serve until so many more cycles have ended; the balance ratio that each round found."""
    end = value(server, "eplb_commits_total") + cycles
    found: list[float] = []
    for round_ in range(12):
        server.generate(prompts(kinds, 8, seed=seed + round_), TOKENS)
        found.append(value(server, RATIO))
        if len(found) >= 5 and value(server, "eplb_commits_total") >= end:
            break
    return found


def test_balancedness_rises_on_shifting_traffic(server: Server, unbalanced: Tokens) -> None:
    """Each kind of text has hot experts of its own: the ratio falls when they change and rises again."""
    ratios_until(server, ("python", "c"), 3, seed=100)
    shifted = ratios_until(server, ("json", "table"), 3, seed=200)
    assert max(shifted[-2:]) > min(shifted[:3]) + 0.05, shifted
    again = ratios_until(server, ("markup",), 3, seed=300)
    assert max(again[-2:]) > min(again[:3]) + 0.02, again
    assert server.generate(PROMPTS, TOKENS) == unbalanced


def test_metrics_tell_what_was_done(server: Server) -> None:
    assert value(server, "eplb_cycles_total", 'outcome="moved"') >= 3
    assert value(server, "eplb_cycles_total", 'outcome="failed"') == 0
    assert value(server, "eplb_moved_experts_total") > 0
    for rank in range(4):
        assert value(server, "eplb_alive", f'rank="{rank}"') == 1
        assert value(server, "eplb_received_bytes_total", f'rank="{rank}"') > 0
    assert value(server, "vllm:generation_tokens_total") > 0
    ranks = server.snapshots()
    assert [rank["rank"] for rank in ranks] == [0, 1, 2, 3]
    assert len({str(rank["physical_to_logical"]) for rank in ranks}) <= 2


def test_server_leaves_when_told(server: Server) -> None:
    server.process.popen.terminate()
    assert server.process.popen.wait(60) is not None
    assert server.process.wait_until_gone(10) == {}
