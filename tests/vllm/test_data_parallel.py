"""`vllm serve` with two engines whose ranks share one expert-parallel group."""

from __future__ import annotations

import json
import time
from pathlib import Path

from eplb_platform.expert_map import ExpertMap
from tests.vllm.conftest import PROMPTS, TOKENS, Models
from tests.vllm.engine import Engine
from tests.vllm.server import VLLM, Server
from tests.vllm.snapshots import PATIENCE_S


def test_tokens_stay_while_experts_move_between_engines(models: Models, folder: Path) -> None:
    with Engine(models.qwen3, folder / "unbalanced.log") as engine:
        expected = engine.generate(PROMPTS, TOKENS).tokens
    record = folder / "map.json"
    eplb = {
        "dynamic_eplb": True,
        "num_redundant_experts": 16,
        "expert_heat_collection_interval": 16,
        "algorithm_execution_interval": 2,
        "expert_map_record_path": str(record),
    }
    command = [VLLM, "serve", str(models.qwen3), "--served-model-name", "tiny", "--skip-tokenizer-init"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--data-parallel-size", "2", "--enable-expert-parallel", "--port", "{port}"]
    command += ["--additional-config", json.dumps({"eplb_config": eplb})]
    with Server(command, folder / "server.log") as server:
        deadline = time.monotonic() + PATIENCE_S
        moved: list[float] = []
        while not sum(moved):
            assert server.generate(PROMPTS, TOKENS) == expected
            assert time.monotonic() < deadline, "nothing moves"
            samples = server.metrics()
            moved = [value for name, value in samples.items() if name.startswith("eplb_moved_experts_total")]
        assert len(moved) == 1
        alive = {name for name in samples if name.startswith("eplb_alive")}
        assert len(alive) == 2
        failed = [
            value
            for name, value in samples.items()
            if name.startswith("eplb_cycles_total") and 'outcome="failed"' in name
        ]
        assert failed == [0.0]
    assert ExpertMap.load(record).topology.num_ranks == 2
