"""One model of a vLLM engine as the balancer sees it: expert weights, device tables, load."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm import kernel_timing
from eplb_platform.integrations.vllm.layer_tensors import LayerTensors, tensors_of
from eplb_platform.integrations.vllm.table_writer import TableWriter
from eplb_platform.runtime.compute_profiling import ComputeProfiling, KernelTimers
from eplb_platform.topology import Topology

if TYPE_CHECKING:
    from vllm.distributed.eplb.eplb_state import EplbModelState

    from eplb_platform.backend import Backend

logger = logging.getLogger(__name__)

WEIGHTED_COLUMNS = 64
"""Entries in which the replicas of an expert take unequal shares; vLLM's tables have room for 1,024."""


class VllmModel:
    """A `WeightedModel` over the device tables that vLLM's routers read in place."""

    def __init__(
        self, state: EplbModelState, topology: Topology, *, num_experts_per_token: int | None
    ) -> None:
        """state: vLLM's own, as its `add_model` leaves it: the weights lie in the initial layout."""
        self._state = state
        self.model_name = state.model_name
        self.num_experts_per_token = num_experts_per_token
        self._expert_map = ExpertMap(
            state.physical_to_logical_map.cpu().numpy(), state.model.num_logical_experts, topology
        )
        self._initial_map = self._expert_map
        self._writer: TableWriter | None = None
        self._columns_in_use = int(self._expert_map.replica_count.max())

    @property
    def can_be_routed(self) -> bool:
        """Whether every layer's router reads the tables; vLLM builds some draft models without."""
        return all(getattr(layer, "eplb_state", True) is not None for layer in self._state.model.moe_layers)

    @property
    def num_expert_groups(self) -> int:
        """DeepSeek's groups for group-limited routing; 1 for models without."""
        return max(int(self._state.model.num_expert_groups or 1), 1)

    @property
    def first_moe_layer(self) -> int | None:
        """The model's layer behind layer 0 of the expert map; dense layers may come first."""
        found = re.search(r"\.(\d+)\.", getattr(self._state.model.moe_layers[0], "layer_name", ""))
        return int(found[1]) if found else None

    @property
    def expert_weights(self) -> list[list[torch.Tensor]]:
        """[layer][parameter]: [slots, ...], whatever the layer says belongs to an expert, scales included."""
        return [
            [parameter.detach() for parameter in parameters]
            for parameters in self._state.model.expert_weights
        ]

    def layer_tensors(self, layer: int) -> Mapping[str, torch.Tensor | Sequence[torch.Tensor]]:
        """By vLLM's names: the layer's `expert_weights`, and what else is an expert's for certain.

        The latter does not move: a copy that a kernel made of scales, say.
        """
        return self._tensors_of(layer).of_experts

    def warn_of_doubtful_tensors(self) -> None:
        """One line about tensors that do not move and may be an expert's, if there are any."""
        layers_of: dict[str, list[int]] = {}
        for layer in range(self._expert_map.num_layers):
            try:
                doubtful = self._tensors_of(layer).doubtful
            except Exception as error:  # vLLM's objects may do anything when looked at
                logger.warning("layer %d: no look at its tensors: %s: %s", layer, type(error).__name__, error)
                break
            for name, tensor in doubtful.items():
                layers_of.setdefault(f"{name} {list(tensor.shape)}", []).append(layer)
        if layers_of:
            logger.warning(
                "%s: %s: not moved with the experts, and they may belong to them; if they do, tokens will be "
                "wrong: compare outputs with those of an engine without eplb_config",
                self.model_name,
                "; ".join(f"{name} in {len(layers)} layers" for name, layers in layers_of.items()),
            )

    def _tensors_of(self, layer: int) -> LayerTensors:
        runner = self._state.model.moe_layers[layer]
        parameters = [parameter.detach() for parameter in self._state.model.expert_weights[layer]]
        experts = getattr(runner, "routed_experts", runner)
        return tensors_of(experts, parameters, self._expert_map.slots_per_rank)

    @property
    def expert_map(self) -> ExpertMap:
        """The placement that tokens are routed by."""
        return self._expert_map

    @property
    def initial_map(self) -> ExpertMap:
        """The layout that vLLM's checkpoint loader writes, the only one it knows."""
        return self._initial_map

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None:
        """Route the tokens of `layers` by `expert_map` from the next forward pass on."""
        chosen = list(layers)
        table = expert_map.logical_to_physical[chosen]
        self.apply_tables(chosen, expert_map, table, expert_map.replica_count[chosen])

    def measure_with(self, profiling: ComputeProfiling, backend: Backend) -> None:
        """Time the kernels of the MoE layers in the passes that `profiling` measures.

        They are looked for when the first pass is to be measured: vLLM may replace them after loading.
        """
        layers, device = self._state.model.moe_layers, self._state.expert_load_pass.device

        def make() -> KernelTimers:
            kernel_timing.attach(layers, profiling)
            held = self._expert_map
            return KernelTimers(backend, held.num_layers, held.slots_per_rank, device)

        profiling.time_with(make, backend.timer())

    @property
    def routing_table_width(self) -> int:
        """Entries of a routing table's row that may be used."""
        redundant = self._expert_map.num_redundant_experts
        most = int(self._state.logical_to_physical_map.shape[-1])
        return min(max(WEIGHTED_COLUMNS, redundant + 1), most) if redundant else 1

    def apply_tables(
        self,
        layers: Sequence[int],
        expert_map: ExpertMap,
        logical_to_physical: NDArray[np.int32],
        count: NDArray[np.int32],
    ) -> None:
        """As `apply_map`, by tables in which entries may repeat: routers take entry (hash of row) % count.

        logical_to_physical: [len(layers), logical, width]; count: [len(layers), logical]

        vLLM's tables are far wider than any row: only the columns in use are written.
        """
        chosen = list(layers)
        width = max(self._columns_in_use, logical_to_physical.shape[-1])
        table = np.full((*count.shape, width), -1, dtype=np.int32)
        table[..., : logical_to_physical.shape[-1]] = logical_to_physical
        state, placed = self._state, expert_map.physical_to_logical[chosen]
        self._write(state.physical_to_logical_map, chosen, placed)
        self._write(state.logical_to_physical_map[:, :, :width], chosen, table)
        self._write(state.logical_replica_count, chosen, count)
        self._columns_in_use = width
        self._expert_map = self._expert_map.replace_layers(chosen, expert_map)

    def write_through(self, backend: Backend) -> None:
        """Write tables on a device through memory of this backend, which it allocates: before serving."""
        if self._state.physical_to_logical_map.device.type != "cpu":
            held, dtype = self._expert_map, self._state.logical_to_physical_map.dtype
            width = max(self.routing_table_width, self._columns_in_use)
            per_layer = held.num_physical_experts + held.num_logical_experts * (width + 1)
            self._writer = TableWriter(backend, dtype, entries=held.num_layers * per_layer)

    def _write(self, table: torch.Tensor, layers: list[int], rows: NDArray[np.int32]) -> None:
        """In place: captured graphs keep reading the table at its address."""
        if table.device.type == "cpu":
            table.numpy()[layers] = rows
        elif self._writer is None:
            raise RuntimeError("the tables are on a device: write_through comes before apply_map")
        else:
            self._writer.write(table, layers, rows)
