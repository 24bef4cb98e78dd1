"""A model whose experts' weights say who they are, so that a token served by the wrong expert shows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from eplb_platform import ExpertMap, Topology
from eplb_platform.backend import Backend

NUM_LAYERS = 3
NUM_EXPERTS = 16
NUM_REDUNDANT = 4
TABLE_WIDTH = 16
TOKENS_PER_STEP = 64
TOP_K = 2
STEPS_PER_TOPIC = 200
MODEL_TIMEOUT_S = 120.0


class TaggedModel:
    """One rank of a mixture of experts whose output for a token is the tag of the expert that served it.

    Every forward pass reads the weights of all ranks with the model's own collective, as an all-to-all would,
    and looks each token up at the physical expert that this rank's tables name. Which experts are hot changes
    with time.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store,
        rank: int,
        num_ranks: int,
        num_redundant_experts: int = NUM_REDUNDANT,
        active_ranks: Sequence[int] | None = None,
        *,
        joins: bool = False,
        steps_per_topic: int = STEPS_PER_TOPIC,
    ) -> None:
        topology = Topology(num_ranks, active_ranks=active_ranks)
        self.rank = rank
        self.expert_map = ExpertMap.initial(NUM_LAYERS, NUM_EXPERTS, topology, num_redundant_experts)
        self._backend = backend
        self._slots = self.expert_map.slots_per_rank
        self._store = store
        self._num_ranks = num_ranks
        self._steps_per_topic = steps_per_topic
        if rank in topology.active_ranks and not joins:
            self.use_ranks(topology.active_ranks, "")
        local = torch.from_numpy(np.array(self.expert_map.by_rank()[:, rank]))
        self.expert_weights = [
            [
                tag(layer, local[layer]).float().unsqueeze(1).repeat(1, 8),
                tag(layer, local[layer]).unsqueeze(1),
            ]
            for layer in range(NUM_LAYERS)
        ]
        width = max(self.expert_map.num_redundant_experts + 1, TABLE_WIDTH)
        self._tables = torch.from_numpy(np.array(self.expert_map.logical_to_physical_padded(width)))
        self._counts = torch.from_numpy(np.array(self.expert_map.replica_count))
        self._width = width
        self.collectives = 0

    def use_ranks(self, ranks: Sequence[int], name: str) -> None:
        """The model's own group is of these ranks from now on."""
        self._ranks = list(ranks)
        store = PrefixStore(f"model{name}", self._store.clone())
        timeout = timedelta(seconds=MODEL_TIMEOUT_S)
        self._group = ProcessGroupGloo(store, self._ranks.index(self.rank), len(ranks), timeout)

    def forget_weights(self) -> None:
        """As in a process that was just started."""
        for first, second in self.expert_weights:
            first.fill_(-7.0)
            second.fill_(-7)

    def reload_weights(self, expert_map: ExpertMap) -> None:
        """Put every expert where `expert_map` says, in place, as a checkpoint loader does."""
        local = torch.from_numpy(np.array(expert_map.by_rank()[:, self.rank]))
        for layer, (first, second) in enumerate(self.expert_weights):
            first.copy_(tag(layer, local[layer]).float().unsqueeze(1))
            second.copy_(tag(layer, local[layer]).unsqueeze(1))

    def misplaced_experts(self, expert_map: ExpertMap) -> int:
        """Slots of this rank whose weights are not those of the expert that `expert_map` has there."""
        local = torch.from_numpy(np.array(expert_map.by_rank()[:, self.rank]))
        wrong = 0
        for layer, (first, second) in enumerate(self.expert_weights):
            expected = tag(layer, local[layer]).unsqueeze(1)
            wrong += int(((first != expected).any(1) | (second != expected).any(1)).sum())
        return wrong

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None:
        chosen = list(layers)
        tables = expert_map.logical_to_physical_padded(self._width)[chosen]
        self.apply_tables(layers, expert_map, tables, expert_map.replica_count[chosen])

    @property
    def routing_table_width(self) -> int:
        return self._width

    def apply_tables(
        self,
        layers: Sequence[int],
        expert_map: ExpertMap,
        logical_to_physical: NDArray[np.int32],
        count: NDArray[np.int32],
    ) -> None:
        for row, layer in enumerate(layers):
            self._tables[layer].copy_(torch.from_numpy(np.array(logical_to_physical[row])))
            self._counts[layer].copy_(torch.from_numpy(np.array(count[row])))

    @property
    def repeats_entries(self) -> bool:
        """Whether some expert's tokens are shared unevenly by its replicas."""
        table = self._tables.numpy()
        return any(len(set(np.bincount(row[row >= 0])) - {0}) > 1 for layer in table for row in layer)

    def forward(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """Serve one batch: (tokens that the wrong expert served, load [layers, physical] that this rank
        sent).
        """
        weights = self._read_all_weights()
        load = torch.zeros(NUM_LAYERS, self._slots * self._num_ranks, dtype=torch.int64)
        wrong = 0
        for layer in range(NUM_LAYERS):
            logical = route(step, self.rank, layer, self._steps_per_topic)
            physical = self._backend.map_and_record(
                logical, self._tables[layer], self._counts[layer], load[layer], offset=self.rank
            )
            wrong += int((weights[layer, physical] != tag(layer, logical).unsqueeze(-1)).any(-1).sum())
        return wrong, load.numpy()

    def _read_all_weights(self) -> torch.Tensor:
        """int64 [layers, physical, parameters]: what each slot's parameters say."""
        mine = torch.stack([torch.stack((w[:, 0].long(), b[:, 0]), -1) for w, b in self.expert_weights])
        parts = {rank: torch.empty_like(mine) for rank in self._ranks}
        self._group.allgather([list(parts.values())], [mine]).wait()
        self.collectives += 1
        nothing = torch.full_like(mine, -1)
        return torch.cat([parts.get(rank, nothing) for rank in range(self._num_ranks)], dim=1)


def tag(layer: int, expert: torch.Tensor) -> torch.Tensor:
    """What a weight of the expert holds; exact in float32."""
    return expert.long() + 1000 * (layer + 1)


def route(step: int, rank: int, layer: int, steps_per_topic: int = STEPS_PER_TOPIC) -> torch.Tensor:
    """int64 [tokens, top_k]: a skewed choice of experts whose favourites move on every few steps."""
    draw = np.random.default_rng((step, rank, layer))
    topic = step // steps_per_topic
    ranked = np.random.default_rng((topic, layer)).permutation(NUM_EXPERTS)
    popularity = 1.0 / np.arange(1, NUM_EXPERTS + 1)
    chosen = draw.choice(NUM_EXPERTS, size=(TOKENS_PER_STEP, TOP_K), p=popularity / popularity.sum())
    return torch.from_numpy(ranked[chosen])
