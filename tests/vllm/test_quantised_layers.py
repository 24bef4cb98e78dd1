"""Experts of vLLM's FP8 layers move with all that belongs to them.

vLLM's quantised experts run on CPUs with AMX alone, so the layers are made as vLLM makes them, but for the
choice of a kernel, and moved between two processes; nothing is computed with them.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed import Store
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

from eplb_backends.cpu import CpuBackend
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import build_schedule
from eplb_platform.migration.staging import Staging
from eplb_platform.migration.transfer import Migrator
from eplb_platform.testing.processes import run_ranks
from eplb_platform.topology import Topology

RANKS, SLOTS, EXPERTS = 2, 3, 5
HIDDEN, INNER, BLOCK = 256, 128, 128
TOPOLOGY = Topology(RANKS)
OLD = ExpertMap(np.array([[0, 1, 2, 3, 4, 0]]), EXPERTS, TOPOLOGY)
NEW = ExpertMap(np.array([[4, 1, 3, 2, 0, 4]]), EXPERTS, TOPOLOGY)
# Of all experts together; they stay where they are.
SHARED = {"w13_input_scale", "w2_input_scale"}


def fp8_layer(block: int | None) -> RoutedExperts:
    """A layer of `SLOTS` experts with the parameters that vLLM's FP8 method gives it."""
    moe = SimpleNamespace(w13_num_shards=2, has_bias=True)
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.local_num_experts = SLOTS
    method = Fp8MoEMethod.__new__(Fp8MoEMethod)
    method.moe = moe
    method.quant_config = SimpleNamespace(
        activation_scheme="dynamic" if block else "static", is_checkpoint_fp8_serialized=True
    )
    method.block_quant = block is not None
    method.weight_block_size = method.moe_block_shape = None if block is None else [block, block]
    method.weight_scale_refine = None
    method.weight_scale_name = "weight_scale" if block is None else "weight_scale_inv"
    with mock.patch.object(parallel_state, "_TP", SimpleNamespace(world_size=1)):
        method.create_weights(layer, SLOTS, HIDDEN, INNER, torch.bfloat16, weight_loader=None)
    return layer


def fill(layer: RoutedExperts, experts: list[int]) -> None:
    """Values that no other expert, and no other parameter, has."""
    for index, (name, parameter) in enumerate(sorted(layer.named_parameters())):
        if name not in SHARED:
            for slot, expert in enumerate(experts):
                parameter.data[slot] = torch.full_like(parameter.data[slot].float(), expert + index / 8)


def move(rank: int, num_ranks: int, store: Store, block: int | None) -> tuple[list[str], list[str]]:
    """Returns the names of the parameters that are right afterwards, and of all of an expert's."""
    backend = CpuBackend()
    backend.connect(store, rank, num_ranks, timeout_s=60.0)
    layer, expected = fp8_layer(block), fp8_layer(block)
    fill(layer, OLD.by_rank()[0, rank].tolist())
    fill(expected, NEW.by_rank()[0, rank].tolist())
    weights = [list(layer.get_expert_weights())]
    staging = Staging(backend, weights, max_bytes=None, layers_per_chunk=1)
    migrator = Migrator(backend, weights, staging, rank, verify=True)
    for chunk in build_schedule(OLD, NEW, layers_per_chunk=1, staging_slots=staging.slots).chunks:
        migrator.fetch(chunk)
        migrator.verify(chunk)
        migrator.swap(chunk)
    right = dict(expected.named_parameters())
    names = [name for name, _ in layer.named_parameters() if name not in SHARED]
    equal = [
        name
        for name, parameter in layer.named_parameters()
        if name in names and torch.equal(parameter.float(), right[name].float())
    ]
    backend.close()
    return equal, names


@pytest.mark.parametrize("block", [None, BLOCK], ids=["per tensor", "per block"])
def test_scales_and_biases_follow_the_weights(block: int | None) -> None:
    scale = "weight_scale" if block is None else "weight_scale_inv"
    for equal, names in run_ranks(move, RANKS, block, timeout_s=300.0):
        assert {"w13_weight", "w2_weight", f"w13_{scale}", f"w2_{scale}", "w13_bias"} <= set(names)
        assert equal == names
