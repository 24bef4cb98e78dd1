"""vLLM's own device tables under the balancer's maps, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.eplb.eplb_state import compute_logical_maps

from eplb_platform.algorithms import rebalance_experts
from eplb_platform.dispatch import weighted_table
from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm.served_model import VllmModel
from eplb_platform.topology import Topology

LAYERS, EXPERTS, SLOTS = 3, 8, 12
TOPOLOGY = Topology(4)


@pytest.fixture
def state() -> Any:
    """The tables as vLLM's `add_model` builds them, with parameters of two kinds: weights and scales."""
    initial = torch.tensor([*range(EXPERTS), *range(SLOTS - EXPERTS)]).expand(LAYERS, -1).contiguous()
    table, count = compute_logical_maps(initial, EXPERTS)
    wide = torch.full((LAYERS, EXPERTS, 1024), -1)
    wide[:, :, : table.shape[-1]] = table
    slots = SLOTS // TOPOLOGY.num_ranks
    parameters = [
        [torch.nn.Parameter(torch.randn(slots, 5)), torch.nn.Parameter(torch.randn(slots, 1))]
        for _ in range(LAYERS)
    ]
    model = SimpleNamespace(
        num_logical_experts=EXPERTS,
        num_expert_groups=1,
        expert_weights=parameters,
        moe_layers=[
            SimpleNamespace(layer_name=f"model.layers.{layer + 1}.mlp.experts") for layer in range(LAYERS)
        ],
    )
    return SimpleNamespace(
        model_name="a model",
        model=model,
        physical_to_logical_map=initial,
        logical_to_physical_map=wide,
        logical_replica_count=count,
        expert_load_pass=torch.zeros(LAYERS, SLOTS, dtype=torch.int32),
    )


def served(state: Any) -> VllmModel:
    return VllmModel(state, TOPOLOGY, num_experts_per_token=2)


def other_map(seed: int) -> ExpertMap:
    load = np.random.default_rng(seed).pareto(1.0, (LAYERS, EXPERTS)) * 100
    return rebalance_experts(
        load, num_physical_experts=SLOTS, topology=TOPOLOGY, algorithm="deepseek"
    ).expert_map


def test_the_tables_are_those_that_vllm_itself_would_make(state: Any) -> None:
    model = served(state)
    addresses = [state.physical_to_logical_map.data_ptr(), state.logical_to_physical_map.data_ptr()]
    for seed in range(5):  # more and fewer replicas than before: no column may be left over
        model.apply_map(range(LAYERS), other_map(seed))
        table, count = compute_logical_maps(state.physical_to_logical_map, EXPERTS)
        assert torch.equal(state.logical_replica_count, count)
        assert torch.equal(state.logical_to_physical_map[:, :, : table.shape[-1]], table)
        assert (state.logical_to_physical_map[:, :, table.shape[-1] :] == -1).all()
    assert addresses == [state.physical_to_logical_map.data_ptr(), state.logical_to_physical_map.data_ptr()]


def test_only_the_layers_named_change(state: Any) -> None:
    model = served(state)
    before, new = model.expert_map, other_map(1)
    model.apply_map([1], new)
    assert state.physical_to_logical_map[1].tolist() == new.physical_to_logical[1].tolist()
    for layer in (0, 2):
        assert state.physical_to_logical_map[layer].tolist() == before.physical_to_logical[layer].tolist()
    assert model.expert_map == before.replace_layers([1], new)
    assert model.initial_map == before


def test_repeated_entries_take_their_share_and_go_away_again(state: Any) -> None:
    model, expert_map = served(state), other_map(2)
    load = np.random.default_rng(2).pareto(1.0, (LAYERS, EXPERTS)) * 100
    weighted = weighted_table(expert_map, load, model.routing_table_width)
    table, count = weighted.logical_to_physical, weighted.count
    model.apply_tables(range(LAYERS), expert_map, table, count)
    assert state.logical_replica_count.tolist() == count.tolist()
    assert state.logical_to_physical_map[:, :, : table.shape[-1]].tolist() == table.tolist()
    model.apply_map(range(LAYERS), expert_map)
    plain, plain_count = compute_logical_maps(state.physical_to_logical_map, EXPERTS)
    assert torch.equal(state.logical_replica_count, plain_count)
    assert (state.logical_to_physical_map[:, :, plain.shape[-1] :] == -1).all()


def test_whatever_the_layer_calls_an_experts_moves_together(state: Any) -> None:
    weights = served(state).expert_weights
    assert [[tuple(parameter.shape) for parameter in layer] for layer in weights] == [
        [(3, 5), (3, 1)]
    ] * LAYERS
    weights[0][1][2].fill_(9.0)
    assert state.model.expert_weights[0][1][2].item() == 9.0


def test_the_first_moe_layer_is_the_models_own_number(state: Any) -> None:
    assert served(state).first_moe_layer == 1


def test_a_router_without_tables_is_noticed(state: Any) -> None:
    assert served(state).can_be_routed
    state.model.moe_layers[1].eplb_state = None
    assert not served(state).can_be_routed
