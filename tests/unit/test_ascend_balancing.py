"""What an engine on Ascend hands to the balancer: group lists as load, layers of which all has to move."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed import TCPStore

from eplb_backends.ascend import AscendBackend
from eplb_backends.cpu.streams import SerialStreams
from eplb_platform import EplbConfig, ExpertMap, Topology, load_backend
from eplb_platform.backend import Backend
from eplb_platform.runtime import start_balancer
from eplb_platform.runtime.deferred_reads import DeferredReader
from tests.fake_torch_npu import FakeTorchNpu, installed

LAYERS, SLOTS = 2, 4
CONFIG = EplbConfig(dynamic_eplb=True, expert_heat_collection_interval=4, algorithm_execution_interval=0)


class HostAscend(AscendBackend):
    """On tensors in host memory, where nothing is pinned."""

    device_type: ClassVar[str] = "cpu"

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostAscend]:
    with installed(monkeypatch) as fake:
        assert isinstance(fake, FakeTorchNpu)
        yield HostAscend(SerialStreams())


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class W8A8:
    """Two layers of int8 weights with their scales; `left` stays where it is."""

    expert_map = ExpertMap.initial(LAYERS, SLOTS, Topology(1))

    def __init__(self, left: str | None = None) -> None:
        self._layers = [
            {
                "w13_weight_list": [torch.zeros(6, 8, dtype=torch.int8) for _ in range(SLOTS)],
                "w13_weight_scale": torch.ones(SLOTS, 8),
                "w2_weight": torch.zeros(SLOTS, 8, 6, dtype=torch.int8),
                "w2_weight_scale": torch.ones(SLOTS, 6),
            }
            for _ in range(LAYERS)
        ]
        self.expert_weights = [
            [tensors for name, tensors in layer.items() if name != left] for layer in self._layers
        ]

    def layer_tensors(self, layer: int) -> Mapping[str, torch.Tensor | Sequence[torch.Tensor]]:
        return self._layers[layer]

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None: ...


class Watching:
    """A planner that keeps what it is to plan on."""

    def __init__(self) -> None:
        self.loads: list[NDArray[np.number]] = []

    async def plan(self, load: NDArray[np.number], current: ExpertMap) -> ExpertMap:
        self.loads.append(load.sum(axis=0))
        return current


@pytest.mark.parametrize("group_list_type", [0, 1])
def test_a_cycle_plans_on_what_the_operators_reported(
    backend: HostAscend, store: TCPStore, group_list_type: int
) -> None:
    planner = Watching()
    balancer = start_balancer(CONFIG, W8A8(), backend, store, 0, planner=planner)
    load = torch.zeros(LAYERS, SLOTS, dtype=torch.int64)
    reader: DeferredReader[ExpertMap] = DeferredReader(backend, load.shape, load.dtype)
    counts = torch.tensor([[3, 0, 5, 1], [0, 0, 2, 7]], dtype=torch.int32)
    deadline = time.monotonic() + 600
    try:
        while not planner.loads:
            assert time.monotonic() < deadline, balancer.stats
            for layer in range(LAYERS):
                reported = counts[layer].cumsum(0).int() if group_list_type == 0 else counts[layer]
                backend.record_group_list(load[layer], reported, group_list_type, first_slot=0)
            assert reader.put(load, balancer.expert_map)
            load.zero_()
            for counted_by, values in reader.ready():
                balancer.step(np.asarray(values, np.int64), counted_by=counted_by)
            time.sleep(0.001)
    finally:
        balancer.close()
    assert planner.loads[0].tolist() == (4 * counts).tolist()


def test_weights_and_scales_that_move_together_are_balanced(backend: HostAscend, store: TCPStore) -> None:
    start_balancer(CONFIG, W8A8(), backend, store, 0).close()


@pytest.mark.parametrize("left", ["w13_weight_scale", "w2_weight_scale", "w13_weight_list", "w2_weight"])
def test_no_balancer_starts_that_would_leave_a_scale_behind(
    backend: HostAscend, store: TCPStore, left: str
) -> None:
    with pytest.raises(ValueError, match=f"^layer 0: {left} would stay where they are while w"):
        start_balancer(CONFIG, W8A8(left), backend, store, 0)


def test_where_nothing_moves_nothing_has_to_move_together(
    backend: HostAscend, store: TCPStore, tmp_path: Path
) -> None:
    config = EplbConfig(expert_map_record_path=str(tmp_path / "map.json"))
    start_balancer(config, W8A8("w2_weight_scale"), backend, store, 0).close()


def test_tensors_that_the_layer_does_not_name_are_noticed(backend: HostAscend, store: TCPStore) -> None:
    model = W8A8()
    model.expert_weights[1].append(torch.zeros(SLOTS, 3))
    with pytest.raises(ValueError, match=r"^layer 1: 5 parameters are in expert_weights, and 4 of them in"):
        start_balancer(CONFIG, model, backend, store, 0)


def test_a_backend_that_reads_no_group_lists_says_so(store: TCPStore) -> None:
    cpu: Backend = load_backend("cpu")
    load = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="backend 'cpu' lacks record_group_list"):
        cpu.record_group_list(load, load, 0, first_slot=0)
