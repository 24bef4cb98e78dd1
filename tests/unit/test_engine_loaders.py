"""Our files against what the engines' own loaders do with them.

Each check below describes, in our words, what one of them takes from the file and demands of it, on any map.
The loaders themselves, where they can be had, run on a few maps in tests/engines and in tests/vllm
(test_own_maps.py); TensorRT-LLM's cannot, so of that there is no more than this.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from pydantic import BaseModel, ConfigDict

from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import expert_map_json, sglang_location, tensorrt_llm_yaml
from tests.unit.strategies import expert_maps, topologies


class MoeLoadBalancerFields(BaseModel):
    """What TensorRT-LLM's configuration of its load balancer takes from a file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    num_slots: int
    initial_global_assignments: dict[int, list[int]]
    layer_updates_per_iter: int = 0


whole_maps = topologies(inactive=False).flatmap(lambda topology: expert_maps(topology=topology))


@settings(max_examples=30)
@given(expert_map=whole_maps)
def test_a_map_meets_vllm_ascend_s_expert_load_balancer_as_described_here(
    expert_map: ExpertMap, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It reads layers and devices by their position, never by their id, stacks all `device_expert` into one
    int32 tensor, takes ranks from the first layer's `device_count`, and the redundancy from the first device.
    """
    path = tmp_path_factory.getbasetemp() / "map.json"
    expert_map_json.write(path, expert_map)
    document = json.loads(path.read_text())
    layers = document["layer_list"]
    stacked = torch.tensor(
        [[device["device_expert"] for device in layer["device_list"]] for layer in layers], dtype=torch.int32
    )
    ranks = layers[0]["device_count"]
    assert stacked.shape == (document["moe_layer_count"], ranks, expert_map.slots_per_rank)
    assert (stacked.numpy() == expert_map.by_rank()).all()
    assert [layer["layer_id"] for layer in layers] == list(range(len(layers)))
    assert all(
        [device["device_id"] for device in layer["device_list"]] == list(range(ranks)) for layer in layers
    )
    experts = expert_map.num_logical_experts
    assert stacked.shape[2] * ranks - experts == expert_map.num_redundant_experts
    # The rank's table: place of each expert on it, -1 elsewhere; indexed by expert, so ids are in range.
    for layer, rank in np.ndindex(len(layers), ranks):
        table = torch.full((experts,), -1, dtype=torch.int32)
        table[stacked[layer, rank].long()] = torch.arange(stacked.shape[2], dtype=torch.int32)
        held = set(expert_map.by_rank()[layer, rank].tolist())
        assert set(torch.nonzero(table >= 0).flatten().tolist()) == held


@settings(max_examples=30)
@given(expert_map=whole_maps)
def test_a_map_meets_tensorrt_llm_s_load_balancer_config_as_described_here(
    expert_map: ExpertMap, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """PyYAML gives the fields of MoeLoadBalancerConfig, a pydantic model that takes no others. A
    layer's list is found by its number in the model, has `num_slots` entries and every expert, and ranks
    share the slots evenly. (PyYAML and pydantic are real here, the model's fields are those described.)
    """
    path = tmp_path_factory.getbasetemp() / "map.yaml"
    tensorrt_llm_yaml.write(path, expert_map, first_moe_layer=3)
    config = MoeLoadBalancerFields(**yaml.safe_load(path.read_text()))
    num_slots = config.num_slots
    assert num_slots >= expert_map.num_logical_experts and num_slots % expert_map.topology.num_ranks == 0
    for layer in range(expert_map.num_layers):
        assignments = config.initial_global_assignments[3 + layer]
        assert len(assignments) == num_slots
        assert assignments == expert_map.physical_to_logical[layer].tolist()


@settings(max_examples=30)
@given(expert_map=whole_maps)
def test_a_map_meets_sglang_s_init_expert_location_as_described_here(
    expert_map: ExpertMap, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A dictionary, read by torch.load or as JSON, whose `physical_to_logical_map` becomes one integer tensor
    [hidden layers, physical]; every logical expert must have a place in every row, dense layers' included.
    """
    for suffix in (".json", ".pt"):
        path = tmp_path_factory.getbasetemp() / f"location{suffix}"
        sglang_location.write(path, expert_map, first_moe_layer=2)
        document = (
            torch.load(path, weights_only=True) if suffix == ".pt" else json.loads(Path(path).read_text())
        )
        table = torch.as_tensor(document["physical_to_logical_map"])
        assert table.shape == (2 + expert_map.num_layers, expert_map.num_physical_experts)
        assert not table.is_floating_point()
        for row in table.tolist():
            assert set(row) == set(range(expert_map.num_logical_experts))
        assert (table[2:].numpy() == expert_map.physical_to_logical).all()
