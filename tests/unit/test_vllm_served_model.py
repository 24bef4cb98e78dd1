"""vLLM's device tables as the balancer writes them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm.served_model import VllmModel
from eplb_platform.topology import Topology

TOPOLOGY = Topology(num_ranks=4)
INITIAL = [[0, 1, 2, 3, 0, 1, 2, 3]] * 2


def model_of(initial: list[list[int]]) -> tuple[VllmModel, SimpleNamespace]:
    state = SimpleNamespace(
        model_name="tiny",
        model=SimpleNamespace(num_logical_experts=4, num_expert_groups=1, expert_weights=[]),
        physical_to_logical_map=torch.tensor(initial),
        logical_to_physical_map=torch.full((2, 4, 1024), -1),
        logical_replica_count=torch.zeros(2, 4, dtype=torch.int64),
        expert_load_pass=torch.zeros(2, 8, dtype=torch.int32),
    )
    return VllmModel(state, TOPOLOGY, num_experts_per_token=2), state


def test_layers_are_applied_although_an_expert_of_another_layer_has_more_replicas() -> None:
    model, state = model_of(INITIAL)
    wide = [[0, 1, 2, 3, 1, 0, 3, 2], [0, 1, 0, 2, 0, 3, 0, 1]]
    after = ExpertMap(np.array(wide), 4, TOPOLOGY)
    model.apply_map([0], after)
    assert state.physical_to_logical_map.tolist() == [wide[0], INITIAL[1]]
    expected = [[0, 5, -1], [1, 4, -1], [2, 7, -1], [3, 6, -1]]
    assert state.logical_to_physical_map[0, :, :3].tolist() == expected
    model.apply_map([1], after)
    assert state.logical_to_physical_map[1, :, :5].tolist()[0] == [0, 2, 4, 6, -1]
    assert state.logical_replica_count.tolist() == [[2, 2, 2, 2], [4, 2, 1, 1]]
    assert model.expert_map == after


def test_entries_of_replicas_that_are_gone_are_removed() -> None:
    model, state = model_of(INITIAL)
    model.apply_map([1], ExpertMap(np.array([INITIAL[0], [0, 1, 0, 2, 0, 3, 0, 1]]), 4, TOPOLOGY))
    model.apply_map([1], ExpertMap(np.array(INITIAL), 4, TOPOLOGY))
    assert state.logical_to_physical_map[1, :, :5].tolist()[0] == [0, 4, -1, -1, -1]
