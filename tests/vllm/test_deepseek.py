"""A DeepSeek-V3 on two ranks: its first layer has no experts, so that layers and MoE layers differ by one."""

from __future__ import annotations

import json
from pathlib import Path

from tests.vllm.conftest import PROMPTS, TOKENS, Models
from tests.vllm.engine import Engine
from tests.vllm.snapshots import layouts, serve_until, statuses


def test_tokens_stay_while_experts_move(models: Models, folder: Path) -> None:
    """One sequence at a time, and two ranks in both engines: latent attention on a CPU rounds by the batch
    and by the number of heads on a rank, and random weights make other tokens of that.
    """
    few = PROMPTS[:4]
    with Engine(models.deepseek, folder / "unbalanced.log", max_num_seqs=1, tensor_parallel_size=2) as engine:
        expected = engine.generate(few, TOKENS).tokens
    record = folder / "map.json"
    eplb = {
        "dynamic_eplb": True,
        "num_redundant_experts": 4,
        "expert_heat_collection_interval": 12,
        "algorithm_execution_interval": 0,
        "layer_updates_per_step": 2,
        "expert_map_record_path": str(record),
    }
    log = folder / "balanced.log"
    with Engine(models.deepseek, log, max_num_seqs=1, tensor_parallel_size=2, eplb=eplb) as engine:

        def serve() -> None:
            assert engine.generate(few, TOKENS).tokens == expected

        serve_until(engine, lambda status: status["cycles"] >= 3 and status["moved_experts"] > 0, serve)
        for status in statuses(engine):
            assert status["failed_cycles"] == 0, status["last_error"]
        first = layouts(engine)[0]
        assert (len(first), len(first[0])) == (2, 20)
    recorded = json.loads(record.read_text())
    assert recorded["moe_layer_count"] == 2
    assert [layer["layer_id"] for layer in recorded["layer_list"]] == [0, 1]
