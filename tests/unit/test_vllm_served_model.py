"""vLLM's device tables as the balancer writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eplb_backends.cpu import CpuBackend
from eplb_platform.cost import ExpertComputeProfiler
from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm.kernel_timing import count_local
from eplb_platform.integrations.vllm.served_model import VllmModel
from eplb_platform.runtime.compute_profiling import ComputeProfiling
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams
from eplb_platform.topology import Topology
from tests.simulated_backend import SimulatedBackend

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


class OnDevice(torch.Tensor):
    """In host memory, and says that it is not."""

    device = SimpleNamespace(type="simulated")  # type: ignore[assignment]


class Counting(SimulatedBackend):
    """Counts the entries that are allocated on the host."""

    entries = 0

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.entries += math.prod(shape)
        return super().allocate_on_host(shape, dtype)


@pytest.mark.parametrize("seed", range(20))
def test_tables_on_a_device_are_written_through_memory_that_was_allocated_before(seed: int) -> None:
    """All layers at once, two times before the device has to be done: the most that a balancer writes."""
    model, state = model_of(INITIAL)
    for name in ("physical_to_logical_map", "logical_to_physical_map", "logical_replica_count"):
        setattr(state, name, getattr(state, name).as_subclass(OnDevice))
    device = SimulatedDevice(seed)
    backend = Counting(SimulatedStreams(device))
    model.write_through(backend)
    allocated = backend.entries
    assert allocated > 0
    wide = [[0, 1, 2, 3, 0, 0, 0, 0], [3, 1, 0, 2, 3, 3, 3, 3]]
    maps = [ExpertMap(np.array(placed), 4, TOPOLOGY) for placed in (wide, INITIAL)]
    for turn in range(6):
        after = maps[turn % 2]
        table = np.zeros((2, 4, model.routing_table_width), np.int32)
        table[..., :2] = after.logical_to_physical[..., :2]
        model.apply_tables(range(2), after, table, after.replica_count)
        if turn % 2:
            device.finish()
            assert state.physical_to_logical_map.tolist() == after.physical_to_logical.tolist()
            assert state.logical_to_physical_map[:, :, : table.shape[-1]].tolist() == table.tolist()
            assert state.logical_replica_count.tolist() == after.replica_count.tolist()
    assert backend.entries == allocated


class Kernel:
    """The part of vLLM's expert kernels that is timed."""

    def apply(self, output: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> int:
        output += 1
        return len(topk_ids)


class MonolithicKernel:
    """Routes by itself: nobody knows the tokens of each expert."""

    def apply(self, router_logits: torch.Tensor) -> None: ...


def layer_with(kernel: object) -> SimpleNamespace:
    return SimpleNamespace(_quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel)))


def test_kernels_are_timed_with_the_tokens_of_this_rank(caplog: pytest.LogCaptureFixture) -> None:
    model, state = model_of(INITIAL)
    kernel = Kernel()
    state.model.moe_layers = [layer_with(kernel), layer_with(MonolithicKernel())]
    profiling = ComputeProfiling(ExpertComputeProfiler(2, 4, warmup_steps=1), rank=1, alpha=1.0)
    model.measure_with(profiling, CpuBackend())
    ids, local = torch.tensor([[2, 0], [2, 3], [-1, 7]]), torch.tensor([-1, -1, 0, 1, -1, -1, -1, -1])
    output = torch.zeros(1)
    for _ in range(3):
        profiling.begin_pass(model.expert_map)
        assert kernel.apply(output, ids, expert_map=local) == 3
        profiling.end_pass()
    assert output.item() == 3 and "layers 1 have a kernel that routes tokens by itself" in caplog.text
    milliseconds, tokens, invocations = profiling.profiler.get_totals()
    # Slots 2 and 3, of rank 1, hold experts 2 and 3; the first pass was the warm-up.
    assert tokens.tolist() == [[0, 0, 4, 2], [0, 0, 0, 0]]
    assert invocations.tolist() == [[0, 0, 2, 2], [0, 0, 0, 0]]
    assert milliseconds[0].sum() > 0 and profiling.residual is not None
    assert profiling.measured_passes == 2


def test_counts_that_vllm_knows_are_taken() -> None:
    counts = torch.zeros(2, dtype=torch.int64)
    meta = SimpleNamespace(expert_num_tokens=torch.tensor([5, 0], dtype=torch.int32))
    count_local({"expert_tokens_meta": meta}, counts)
    assert counts.tolist() == [5, 0]
