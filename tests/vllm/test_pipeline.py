"""Two pipeline stages of two ranks: each stage balances its own layers, and the file has them all.

Compiled, because vLLM 0.32 on a CPU cannot run a pipeline eagerly.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eplb_platform.expert_map import ExpertMap
from tests.vllm.conftest import PROMPTS, TOKENS, Models
from tests.vllm.engine import Engine
from tests.vllm.snapshots import serve_until, serve_until_idle


def test_stages_are_balanced_apart_and_recorded_together(
    models: Models, unbalanced: list[list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "map.json"
    eplb = {
        "dynamic_eplb": True,
        "expert_heat_collection_interval": 16,
        "algorithm_execution_interval": 4,
        "num_redundant_experts": 4,
        "expert_map_record_path": str(path),
    }
    layout = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enforce_eager": False}
    with Engine(models.demo, tmp_path / "engine.log", eplb=eplb, **layout) as engine:

        def serve() -> None:
            assert engine.generate(PROMPTS, TOKENS).tokens == unbalanced

        serve_until(engine, lambda status: status["moved_experts"] > 0, serve)
        engine.rpc("eplb_pause")
        serve()
        serve_until_idle(engine, PROMPTS[:2])
        snapshots = engine.rpc("eplb_snapshot")
    assert [(shot["stage"], shot["rank"]) for shot in snapshots] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    tables = []
    for first, second in (snapshots[:2], snapshots[2:]):
        assert first["moved_experts"] > 0
        assert first["physical_to_logical"] == second["physical_to_logical"]
        tables += next(iter(first["physical_to_logical"].values()))
    recorded = ExpertMap.load(path)
    assert recorded.num_layers == len(tables) == 4
    assert np.array_equal(recorded.physical_to_logical, np.array(tables))
