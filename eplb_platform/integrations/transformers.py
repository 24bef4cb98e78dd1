"""Expert parallelism for a Hugging Face Qwen3-MoE checkpoint on torch.distributed.

The Hugging Face module is built without memory; its MoE blocks become `ExpertParallelMoe`, which holds the
experts of this rank's slots only and sends each token to the physical experts that the routing tables name.
Everything else of the model is whole on every rank, and every rank serves tokens of its own.

The output of a token does not depend on which replica served it, nor on what else that expert had to do in
the same pass: in float32 it is the same bit by bit under every expert map (see `ROW_BLOCK`).

Run with transformers 4.56.2 and 5.23.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from eplb_platform.backend import Backend, DeviceTimer
from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.checkpoint_folder import (
    CheckpointError,
    CheckpointFolder,
    ExpertReader,
    ExpertShape,
    read_config,
)
from eplb_platform.runtime.compute_profiling import ComputeProfiling, LayerSlotTimers, SlotTimers
from eplb_platform.topology import Topology

try:
    from transformers.activations import ACT2FN
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM
except ImportError as error:
    raise ImportError(f"{error}; to serve a Hugging Face model: pip install 'eplb_platform[demo]'") from error

__all__ = ["CheckpointError", "ExpertParallelModel", "ExpertParallelMoe", "load_expert_parallel"]

ROW_BLOCK = 16
"""An expert's rows are padded to a multiple of this. Matrix libraries take other kernels, with another
rounding, for the smallest matrices (seen: below four rows); from one block on, the neighbours of a row change
nothing."""

MAX_REPLICA_COLUMNS = 1024

ROUTING = frozenset({"gate", "logical_to_physical", "replica_count", "load"})
"""Tensors of a MoE layer that belong to no slot, of whatever length."""

TIMED_PARTS = 2
"""An expert's work comes in two matrix products, before and after the activation."""

WEIGHTED_COLUMNS = 32
"""Entries for an expert where there are redundant ones, so that replicas can take unequal shares."""


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that share the experts, from one rank's side."""

    rank: int
    num_ranks: int
    group: dist.ProcessGroup | None
    """The model's own; every wait in it ends with its time-out. None is the default group."""

    def all_to_all(
        self, output: torch.Tensor, rows: torch.Tensor, receive: list[int], send: list[int]
    ) -> None:
        """Send `send[r]` rows to rank r and receive `receive[r]` rows from it into `output`.

        Through host memory where the group has no backend for the rows' device.
        """
        if self.num_ranks == 1:
            output.copy_(rows)
        elif self._reaches(rows.device):
            dist.all_to_all_single(output, rows, receive, send, group=self.group)
        else:
            received = torch.empty_like(output, device="cpu")
            dist.all_to_all_single(received, rows.cpu(), receive, send, group=self.group)
            output.copy_(received)

    def _reaches(self, device: torch.device) -> bool:
        group = self.group if self.group is not None else dist.group.WORLD
        return group is None or device.type in {known.type for known in group._device_types}


@dataclass(frozen=True)
class ExchangePlan:
    """How the rows of one MoE layer travel in one pass, from the counts that the ranks told each other."""

    send: list[int]
    """Rows for each rank."""
    receive: list[int]
    """Rows from each rank; each rank's come in the order of our slots."""
    source: NDArray[np.int64]
    """[padded rows] the received row that stands there; padding repeats row 0."""
    position: NDArray[np.int64]
    """[received rows] where a received row stands among the padded rows."""
    bounds: list[tuple[int, int, int]]
    """(slot, first padded row, last + 1) of each slot that has rows."""
    tokens: NDArray[np.int64]
    """[slots], rows that each slot received."""


def plan_exchange(send_counts: NDArray[np.int64], receive_counts: NDArray[np.int64]) -> ExchangePlan:
    """Both [ranks, slots]: tokens from here to each slot of each rank, from each rank to each slot here."""
    per_slot = receive_counts.sum(axis=0)
    padded = -(-per_slot // ROW_BLOCK) * ROW_BLOCK
    ends = np.cumsum(padded)
    chunk_start = np.cumsum(receive_counts).reshape(receive_counts.shape) - receive_counts
    earlier_ranks = np.cumsum(receive_counts, axis=0) - receive_counts
    shift = (ends - padded) + earlier_ranks - chunk_start
    total = int(per_slot.sum())
    position = np.repeat(shift.ravel(), receive_counts.ravel()) + np.arange(total)
    source = np.zeros(int(ends[-1]), dtype=np.int64)
    source[position] = np.arange(total)
    busy = np.flatnonzero(padded)
    bounds = list(zip(busy.tolist(), (ends - padded)[busy].tolist(), ends[busy].tolist(), strict=True))
    return ExchangePlan(
        send_counts.sum(axis=1).tolist(),
        receive_counts.sum(axis=1).tolist(),
        source,
        position,
        bounds,
        per_slot,
    )


class ExpertParallelMoe(nn.Module):
    """One MoE layer of which this rank holds the experts of its slots.

    Its weights are plain tensors that the forward pass reads in place: whoever overwrites a slot of them,
    or the routing tables, changes what the next pass does.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        gate: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        group: ExpertGroup,
        backend: Backend,
        offset: int,
    ) -> None:
        """
        gate: [logical, hidden], the router's weight
        gate_up, down: [slots, 2 * intermediate, hidden] and [slots, hidden, intermediate]
        offset: where this rank starts in the round of an expert's replicas
        """
        super().__init__()
        self.top_k: int = config.num_experts_per_tok
        self.norm_topk_prob: bool = config.norm_topk_prob
        self.activation: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[config.hidden_act]
        self.gate = gate
        self.gate_up = gate_up
        self.down = down
        self.group = group
        self.backend = backend
        self.offset = offset
        self.num_slots = len(gate_up)
        self.num_physical_experts = group.num_ranks * self.num_slots
        self.logical_to_physical = torch.empty(0)
        self.replica_count = torch.empty(0)
        self.load = torch.empty(0)
        self._profiling: ComputeProfiling | None = None
        self._layer = 0

    @property
    def expert_weights(self) -> list[torch.Tensor]:
        """All that belongs to the experts of this rank's slots, [slots, ...] each."""
        return [self.gate_up, self.down]

    @property
    def tensors_of_experts(self) -> dict[str, torch.Tensor]:
        """All that this layer keeps with one entry for each slot, moved or not, by name."""
        held = {**vars(self), **dict(self.named_parameters()), **dict(self.named_buffers())}
        tensors = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name not in ROUTING and tensor.shape[:1] == (self.num_slots,)
        }

    def measure_with(self, profiling: ComputeProfiling, layer: int) -> None:
        """Time the experts as this layer of the expert map, in the passes that `profiling` measures."""
        self._profiling, self._layer = profiling, layer

    def use_tables(
        self, logical_to_physical: torch.Tensor, replica_count: torch.Tensor, load: torch.Tensor
    ) -> None:
        """Route by these tables and count into `load` [physical] from now on; all are updated in place."""
        self.logical_to_physical = logical_to_physical
        self.replica_count = replica_count
        self.load = load

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden] -> the same shape. Every rank of the group must be in the same layer."""
        return self.forward_rows(hidden_states.reshape(-1, hidden_states.shape[-1])).view_as(hidden_states)

    def forward_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> the same shape; a rank without tokens takes part with 0 rows."""
        weights, logical = self.route(tokens)
        physical = self.backend.map_and_record(
            logical, self.logical_to_physical, self.replica_count, self.load, offset=self.offset
        ).flatten()
        order = physical.argsort(stable=True)
        plan = self._plan(torch.bincount(physical, minlength=self.num_physical_experts))
        rows = tokens.new_empty(len(plan.position), tokens.shape[1])
        self.group.all_to_all(rows, tokens[order // self.top_k], plan.receive, plan.send)
        served = self.serve(rows, plan)
        returned = tokens.new_empty(len(order), tokens.shape[1])
        self.group.all_to_all(returned, served, plan.send, plan.receive)
        choices = torch.empty_like(returned).index_copy_(0, order, returned)
        # Summed in the order of the router's choices, whichever rank answered first.
        return (choices.view(*weights.shape, tokens.shape[1]) * weights[..., None]).sum(1)

    def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Qwen3-MoE's router: weights and logical experts, both [tokens, top_k]."""
        probabilities = F.linear(tokens, self.gate).softmax(dim=-1, dtype=torch.float)
        weights, logical = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(tokens.dtype), logical

    def serve(self, rows: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
        """Received rows [received, hidden] -> what this rank's experts make of them, in the same order."""
        if not len(rows):
            return rows
        padded = rows[torch.from_numpy(plan.source).to(rows.device)]
        inner = rows.new_empty(len(padded), self.gate_up.shape[1])
        timers = self._timers(plan.tokens)
        self._multiply(padded, self.gate_up, inner, plan, None if timers is None else timers.parts[0])
        gated = self._activate(inner, None if timers is None else timers.shared)
        self._multiply(gated, self.down, padded, plan, None if timers is None else timers.parts[1])
        return padded[torch.from_numpy(plan.position).to(rows.device)]

    def _timers(self, tokens: NDArray[np.int64]) -> LayerSlotTimers | None:
        """This layer's timers where the pass is measured."""
        profiling = self._profiling
        if profiling is None or not isinstance(profiling.current, SlotTimers):
            return None
        timers = profiling.current.of_layer(self._layer)
        if timers is not None:
            timers.tokens[:] = tokens
        return timers

    def _multiply(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        plan: ExchangePlan,
        timers: Sequence[DeviceTimer] | None,
    ) -> None:
        """Each expert's rows by its weights, into the same rows of `output`."""
        for slot, start, end in plan.bounds:
            if timers is None:
                self.multiply(slot, rows[start:end], weights[slot], output[start:end])
            else:
                timers[slot].start()
                self.multiply(slot, rows[start:end], weights[slot], output[start:end])
                timers[slot].stop()

    def multiply(self, slot: int, rows: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> None:
        """One matrix product of one expert."""
        torch.mm(rows, weight.t(), out=output)

    def _activate(self, inner: torch.Tensor, timer: DeviceTimer | None) -> torch.Tensor:
        """[rows, 2 * intermediate] -> [rows, intermediate], all experts at once."""
        if timer is not None:
            timer.start()
        gate, up = inner.chunk(2, dim=-1)
        gated = self.activation(gate) * up
        if timer is not None:
            timer.stop()
        return gated

    def _plan(self, counts: torch.Tensor) -> ExchangePlan:
        received = torch.empty_like(counts)
        slots = self.num_slots
        each = [slots] * self.group.num_ranks
        self.group.all_to_all(received, counts, each, each)
        both = torch.stack((counts, received)).view(2, -1, slots).cpu().numpy()
        return plan_exchange(both[0], both[1])


class ExpertParallelModel:
    """A Qwen3-MoE as one rank serves it; a `ServedModel` for the balancer."""

    def __init__(
        self,
        module: Qwen3MoeForCausalLM,
        blocks: Sequence[ExpertParallelMoe],
        moe_layers: Sequence[int],
        expert_map: ExpertMap,
    ) -> None:
        self.module = module
        """The Hugging Face module; call it as usual, under `torch.inference_mode()`."""
        self.moe_layers = tuple(moe_layers)
        """The model's layer behind each layer of the expert map."""
        self._blocks = tuple(blocks)
        self._expert_map = expert_map
        device = blocks[0].gate.device
        redundant = expert_map.num_redundant_experts
        width = min(max(redundant + 1, WEIGHTED_COLUMNS if redundant else 1), MAX_REPLICA_COLUMNS)
        layers, experts = expert_map.num_layers, expert_map.num_logical_experts
        self._logical_to_physical = torch.zeros(layers, experts, width, dtype=torch.int64, device=device)
        self._replica_count = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._load = torch.zeros(layers, expert_map.num_physical_experts, dtype=torch.int64, device=device)
        for layer, block in enumerate(blocks):
            block.use_tables(self._logical_to_physical[layer], self._replica_count[layer], self._load[layer])
        self.apply_map(range(layers), expert_map)

    @property
    def config(self) -> Qwen3MoeConfig:
        """The checkpoint's configuration."""
        return self.module.config

    @property
    def blocks(self) -> tuple[ExpertParallelMoe, ...]:
        """The MoE layers, in the order of the expert map's."""
        return self._blocks

    @property
    def rank(self) -> int:
        """This rank in the group that shares the experts."""
        return self._blocks[0].group.rank

    @property
    def expert_weights(self) -> list[list[torch.Tensor]]:
        """[layer][gate and up, down]: [slots, 2 * intermediate, hidden] and [slots, hidden, intermediate]."""
        return [block.expert_weights for block in self._blocks]

    def layer_tensors(self, layer: int) -> Mapping[str, torch.Tensor]:
        """All that a layer of the expert map keeps for this rank's slots, moved or not, by name."""
        return self._blocks[layer].tensors_of_experts

    @property
    def expert_map(self) -> ExpertMap:
        """The placement that tokens are routed by."""
        return self._expert_map

    @property
    def num_experts_per_token(self) -> int:
        """Logical experts that each token is routed to in each MoE layer."""
        return self._blocks[0].top_k

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None:
        """Route the tokens of `layers` by `expert_map` from the next forward pass on, on this rank.

        Raises ValueError for a map of another shape than the one loaded.
        """
        chosen = list(layers)
        table = expert_map.logical_to_physical_padded(self.routing_table_width)[chosen]
        self.apply_tables(layers, expert_map, table, expert_map.replica_count[chosen])

    @property
    def routing_table_width(self) -> int:
        """Entries of a routing table's row."""
        return int(self._logical_to_physical.shape[-1])

    def apply_tables(
        self,
        layers: Sequence[int],
        expert_map: ExpertMap,
        logical_to_physical: NDArray[np.int32],
        count: NDArray[np.int32],
    ) -> None:
        """As `apply_map`, by tables in which entries may repeat.

        logical_to_physical: [len(layers), logical, width]; count: [len(layers), logical]
        """
        old = self._expert_map
        if expert_map.physical_to_logical.shape != old.physical_to_logical.shape or (
            expert_map.num_logical_experts != old.num_logical_experts
        ):
            raise ValueError(f"expert map {expert_map!r}; the model was loaded for {old!r}")
        chosen = list(layers)
        for target, rows in ((self._logical_to_physical, logical_to_physical), (self._replica_count, count)):
            target[chosen] = torch.from_numpy(rows.astype(np.int64)).to(self._load.device)
        self._expert_map = old.replace_layers(chosen, expert_map)

    def measure_with(self, profiling: ComputeProfiling, backend: Backend) -> None:
        """Time each expert's matrix products in the passes that `profiling` measures."""
        layers, slots = self._expert_map.num_layers, self._expert_map.slots_per_rank
        profiling.time_with(lambda: SlotTimers(backend, layers, slots, TIMED_PARTS), backend.timer())
        for layer, block in enumerate(self._blocks):
            block.measure_with(profiling, layer)

    def take_load(self) -> NDArray[np.int64]:
        """Tokens that this rank sent to each physical expert since the last call: [layers, physical]."""
        load = self._load.cpu().numpy().copy()
        self._load.zero_()
        return load

    @torch.inference_mode()
    def dummy_step(self) -> None:
        """Take part in one forward pass without tokens: serve the other ranks' tokens, count nothing."""
        for block in self._blocks:
            block.forward_rows(block.gate.new_empty(0, block.gate.shape[1]))


def load_expert_parallel(
    checkpoint: str | Path,
    *,
    rank: int,
    num_ranks: int,
    group: dist.ProcessGroup | None = None,
    backend: Backend,
    expert_map: ExpertMap | None = None,
    num_redundant_experts: int = 0,
    num_nodes: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    moe_class: type[ExpertParallelMoe] = ExpertParallelMoe,
) -> ExpertParallelModel:
    """Load one rank's part of a Qwen3-MoE checkpoint folder.

    group: the model's own process group, whose time-out bounds every wait of a forward pass; None is the
        default group. One rank alone needs none.
    expert_map: weights are read right into its places; without one the experts lie contiguously, with
        `num_redundant_experts` replicas behind them.
    device: where the weights lie; without one, the backend's device.
    moe_class: what the MoE layers become, for experts that compute in another way.

    Raises CheckpointError (a ValueError) when the folder is no Qwen3-MoE checkpoint or lacks something, and
    ValueError for an expert map that does not fit the model or the group.
    """
    folder = Path(checkpoint)
    config = _configuration(folder)
    moe_layers = find_moe_layers(config, folder)
    if expert_map is None:
        topology = Topology(num_ranks, num_nodes)
        expert_map = ExpertMap.initial(len(moe_layers), config.num_experts, topology, num_redundant_experts)
    _check_map(expert_map, len(moe_layers), config.num_experts, num_ranks)
    experts = ExpertGroup(rank, num_ranks, group)
    target = device if device is not None else torch.device(backend.device_type)
    with CheckpointFolder(folder) as files, torch.inference_mode(mode=False):
        module = _build_dense(config, files, moe_layers, dtype, target)
        weights = _read_experts(config, files, moe_layers, expert_map, rank, dtype, target)
        blocks = []
        for index, layer in enumerate(moe_layers):
            gate_shape = (config.num_experts, config.hidden_size)
            gate = files.read(f"model.layers.{layer}.mlp.gate.weight", gate_shape).to(target, dtype)
            block = moe_class(config, gate, *weights[index], experts, backend, offset=rank)
            module.model.layers[layer].mlp = block
            blocks.append(block)
    module.train(False)
    return ExpertParallelModel(module, blocks, moe_layers, expert_map)


def _configuration(folder: Path) -> Qwen3MoeConfig:
    values = read_config(folder)
    try:
        return Qwen3MoeConfig.from_dict(values)
    except Exception as error:
        # What it raises for a bad value differs between versions of transformers; it can fill many lines.
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / 'config.json'}: expected a Qwen3-MoE configuration: {reason}"
        ) from error


def find_moe_layers(config: Qwen3MoeConfig, folder: Path) -> list[int]:
    """The layers that have experts, by Qwen3-MoE's rule. Raises CheckpointError when there are none."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
    layers = [i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0]
    if not layers or config.num_experts < 1:
        raise CheckpointError(f"{folder / 'config.json'}: expected a layer with experts, found none")
    return layers


def _check_map(expert_map: ExpertMap, num_layers: int, num_experts: int, num_ranks: int) -> None:
    for what, found, expected in (
        ("MoE layers", expert_map.num_layers, num_layers),
        ("logical experts", expert_map.num_logical_experts, num_experts),
        ("ranks", expert_map.topology.num_ranks, num_ranks),
    ):
        if found != expected:
            raise ValueError(f"expert map for {found} {what}; this model and group have {expected}")


def _build_dense(
    config: Qwen3MoeConfig,
    files: CheckpointFolder,
    moe_layers: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Qwen3MoeForCausalLM:
    """The Hugging Face module with everything but its MoE blocks, which are left out."""
    scaffold = copy.deepcopy(config)
    # Dense blocks stand in for the MoE blocks: thousands of experts would be built to be thrown away.
    scaffold.mlp_only_layers = list(range(config.num_hidden_layers))
    with torch.device("meta"):
        module = Qwen3MoeForCausalLM(scaffold)
    module.config = config
    for layer in moe_layers:
        module.model.layers[layer].mlp = nn.Identity()
    # The rotary tables are computed, not stored: made anew on a real device.
    module.model.rotary_emb = type(module.model.rotary_emb)(config=config).to(device)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set[str]()
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if name not in tied:
            _set_parameter(module, name, files.read(name, parameter.shape).to(device, dtype))
    if tied:
        module.lm_head.weight = module.model.embed_tokens.weight
    return module


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _read_experts(
    config: Qwen3MoeConfig,
    files: CheckpointFolder,
    moe_layers: Sequence[int],
    expert_map: ExpertMap,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per MoE layer, this rank's (gate_up, down), read right into the slots; empty slots are zero."""
    shape = ExpertShape(config.num_experts, config.hidden_size, config.moe_intermediate_size)
    slots = expert_map.by_rank()[:, rank].tolist()
    weights = []
    for index, layer in enumerate(moe_layers):
        reader = ExpertReader(files, layer, shape)
        gate_up = torch.zeros(len(slots[index]), *shape.gate_up, dtype=dtype, device=device)
        down = torch.zeros(len(slots[index]), *shape.down, dtype=dtype, device=device)
        for slot, expert in enumerate(slots[index]):
            if expert >= 0:
                reader.read(expert, gate_up[slot], down[slot])
        weights.append((gate_up, down))
    return weights
