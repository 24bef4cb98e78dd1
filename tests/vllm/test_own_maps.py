"""A list of lists that `eplb convert` wrote, in vLLM's own EPLB state; and its own initial map beside ours.

Real: EplbState.from_mapping, which builds the state of a model and takes its map, with vLLM's configuration.
Stand-ins: the model, and the group over which weights would move.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import EPLBConfig, ParallelConfig
from vllm.distributed.eplb import eplb_state

from eplb_platform.cli import run
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

LAYERS, EXPERTS, RANKS, SLOTS = 2, 8, 4, 3
REDUNDANT = RANKS * SLOTS - EXPERTS


def some_map() -> ExpertMap:
    rng = np.random.default_rng(0)
    rows = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), np.arange(REDUNDANT)])) for _ in range(LAYERS)
    ]
    return ExpertMap(rows, EXPERTS, Topology(RANKS))


def model() -> Any:
    return SimpleNamespace(
        num_moe_layers=LAYERS,
        num_logical_experts=EXPERTS,
        num_routed_experts=EXPERTS,
        num_redundant_experts=REDUNDANT,
        num_physical_experts=RANKS * SLOTS,
        num_local_physical_experts=SLOTS,
        expert_weights=[[torch.zeros(SLOTS, 4)] for _ in range(LAYERS)],
        moe_layers=[],
        set_eplb_state=lambda *tables: None,
    )


def test_a_converted_map_is_the_state_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eplb_state, "get_eplb_group", lambda: None)
    monkeypatch.setattr(eplb_state, "create_eplb_communicator", lambda **arguments: None)
    expert_map = some_map()
    expert_map.save(tmp_path / "map.json")
    converted = tmp_path / "vllm.json"
    assert run(["convert", str(tmp_path / "map.json"), "-o", str(converted), "--to", "vllm"]) == 0
    parallel = ParallelConfig(eplb_config=EPLBConfig(communicator="torch_gloo"))
    configuration = SimpleNamespace(model="a model", compute_hash=lambda: "hash")
    rows = torch.tensor(json.loads(converted.read_text()))
    state = eplb_state.EplbState.from_mapping(
        model(), configuration, torch.device("cpu"), parallel, rows
    ).model_states["hash"]
    assert (state.physical_to_logical_map.numpy() == expert_map.physical_to_logical).all()
    assert (state.logical_replica_count.numpy() == expert_map.replica_count).all()
    held = expert_map.logical_to_physical
    assert (state.logical_to_physical_map[:, :, : held.shape[2]].numpy() == held).all()
    assert (state.logical_to_physical_map[:, :, held.shape[2] :] == -1).all()


def test_the_engine_s_initial_map_is_read_and_is_ours(tmp_path: Path) -> None:
    row = eplb_state.EplbState.build_initial_global_physical_to_logical_map(EXPERTS, REDUNDANT)
    (tmp_path / "initial.json").write_text(json.dumps([list(row)] * LAYERS))
    read = ExpertMap.load(tmp_path / "initial.json", format="vllm", topology=Topology(RANKS))
    assert read == ExpertMap.initial(LAYERS, EXPERTS, Topology(RANKS), REDUNDANT)
