"""vLLM's routers on CPUs: ids of physical experts, counted where vLLM counts on other devices."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.platforms import current_platform

from eplb_platform.integrations.vllm import cpu_routing

if not current_platform.is_cpu():
    pytest.skip("vLLM is not built for CPUs", allow_module_level=True)

WIDTH = 1024
"""Of vLLM's table: as many replicas as it allows an expert."""


class FixedRouter(base_router.BaseRouter):
    """Routes as it is told, through vLLM's own template method."""

    def __init__(self, ids: torch.Tensor, state: EplbLayerState) -> None:
        super().__init__(top_k=ids.shape[1], global_num_experts=8, eplb_state=state)
        self.ids = ids

    def routing_method_type(self) -> None:  # type: ignore[override]
        return None

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: object,
        *,
        input_ids: object = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(self.ids.shape), self.ids


def tables(replicas: dict[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's tables of one layer: physical experts of each logical one."""
    table = torch.full((len(replicas), WIDTH), -1, dtype=torch.int64)
    for logical, places in replicas.items():
        table[logical, : len(places)] = torch.tensor(places)
    return table, torch.tensor([len(places) for places in replicas.values()])


def route(
    ids: torch.Tensor,
    replicas: dict[int, list[int]],
    *,
    num_physical: int,
    records: bool = True,
    num_unpadded: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Physical ids and counts, as a layer of vLLM gets them."""
    cpu_routing.install()
    table, count = tables(replicas)
    # vLLM's counts of a layer are a row of a larger tensor.
    load = torch.zeros(3, num_physical, dtype=torch.int32)
    state = EplbLayerState()
    state.expert_load_view = load[1]
    state.logical_to_physical_map = table
    state.logical_replica_count = count
    state.should_record_tensor = torch.tensor(records)
    unpadded = len(ids) if num_unpadded is None else num_unpadded
    state.num_unpadded_tokens_tensors = [torch.tensor(unpadded, dtype=torch.int32)]
    _, physical = FixedRouter(ids, state).select_experts(torch.empty(len(ids), 1), torch.empty(len(ids), 1))
    assert not load[[0, 2]].any()
    return physical, load[1]


REPLICAS = {0: [4], 1: [0, 3], 2: [2, 5, 1]}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_choice_goes_to_a_replica_of_its_expert_and_is_counted(dtype: torch.dtype) -> None:
    ids = torch.randint(0, 3, (301, 2), generator=torch.Generator().manual_seed(3)).to(dtype)
    physical, load = route(ids, REPLICAS, num_physical=6)
    assert physical.dtype == dtype
    for logical, places in REPLICAS.items():
        assert set(physical[ids == logical].tolist()) == set(places)
    assert torch.equal(load.long(), torch.bincount(physical.flatten(), minlength=6))
    assert load.dtype == torch.int32


@pytest.mark.parametrize("replicas", [2, 3, 7, 32])
def test_consecutive_rows_spread_evenly_over_the_replicas(replicas: int) -> None:
    ids = torch.zeros(4096, 1, dtype=torch.int32)
    _, load = route(ids, {0: list(range(replicas))}, num_physical=replicas)
    assert float((load - 4096 / replicas).abs().max()) <= 2


def test_padding_is_mapped_but_not_counted() -> None:
    ids = torch.randint(0, 3, (64, 2), generator=torch.Generator().manual_seed(4)).to(torch.int32)
    whole, _ = route(ids, REPLICAS, num_physical=6)
    for num_unpadded in (0, 1, 40, 64, 90):
        physical, load = route(ids, REPLICAS, num_physical=6, num_unpadded=num_unpadded)
        assert torch.equal(physical, whole)  # a row's replica does not depend on where padding begins
        assert torch.equal(load.long(), torch.bincount(whole[:num_unpadded].flatten(), minlength=6))


def test_nothing_is_counted_unless_recording() -> None:
    ids = torch.zeros(8, 2, dtype=torch.int32)
    physical, load = route(ids, REPLICAS, num_physical=6, records=False)
    assert (physical == 4).all() and not load.any()


def test_no_choice_stays_none_and_an_unknown_expert_is_an_error() -> None:
    physical, load = route(torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32), REPLICAS, num_physical=6)
    assert physical.tolist() == [[4, -1], [-1, -1]] and load.tolist() == [0, 0, 0, 0, 1, 0]
    with pytest.raises(ValueError, match="row 1: 3 is not one of 3 logical experts"):
        route(torch.tensor([[0, 1], [3, 0]], dtype=torch.int32), REPLICAS, num_physical=6)


def test_no_rows_at_all() -> None:
    physical, load = route(torch.empty(0, 2, dtype=torch.int32), REPLICAS, num_physical=6)
    assert physical.shape == (0, 2) and not load.any()
