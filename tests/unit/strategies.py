"""Hypothesis strategies for topologies, expert maps and loads."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology


@st.composite
def topologies(draw: st.DrawFn, max_ranks: int = 6, inactive: bool = True) -> Topology:
    """Any topology, with ranks that are inactive if `inactive`."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_nodes = draw(st.integers(1, num_ranks))
    active = draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)) if inactive else range(num_ranks)
    return Topology(num_ranks, num_nodes, active)


@st.composite
def expert_maps(
    draw: st.DrawFn, max_layers: int = 3, max_slots: int = 5, topology: Topology | None = None
) -> ExpertMap:
    """Any valid map, with replicas on one rank among them."""
    topology = topology or draw(topologies())
    num_layers = draw(st.integers(1, max_layers))
    slots_per_rank = draw(st.integers(1, max_slots))
    slots = slots_per_rank * topology.num_active_ranks
    num_logical_experts = draw(st.integers(1, slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = np.full((num_layers, topology.num_ranks, slots_per_rank), -1)
    for layer in range(num_layers):
        replicas = rng.integers(num_logical_experts, size=slots - num_logical_experts)
        experts = rng.permutation(np.concatenate([np.arange(num_logical_experts), replicas]))
        table[layer, topology.is_active] = experts.reshape(-1, slots_per_rank)
    return ExpertMap(table.reshape(num_layers, -1), num_logical_experts, topology)


@st.composite
def loads(draw: st.DrawFn, *shape: int) -> NDArray[np.int64]:
    """Tokens of any order of magnitude; experts and layers without any, and ties, among them."""
    largest = draw(st.sampled_from([0, 1, 5, 1000, 10**12]))
    values = draw(
        st.lists(st.integers(0, largest), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))
    )
    return np.array(values, dtype=np.int64).reshape(shape)
