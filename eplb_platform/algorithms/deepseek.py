"""DeepSeek's EPLB: replicate the hottest experts, pack replicas evenly; by nodes first where groups allow.

Source: DeepSeek-V3 technical report (arXiv:2412.19437, section 3.4) and its open-sourced EPLB.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.algorithm import Algorithm
from eplb_platform.algorithms.slots import keep_ranks
from eplb_platform.balance import window_balancedness
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

# Two sums of the same loads in another order differ by less than this.
_EQUAL_BALANCEDNESS = 1e-9


class DeepSeek(Algorithm):
    """Greedy replication and balanced packing of the load summed over the windows.

    Hierarchical where it can be (see `serving_ranks_by_node`): all replicas of an expert group on one node.
    Whole ranks then change places towards the current map, and a layer that would gain nothing stays.
    """

    name: ClassVar[str] = "deepseek"
    hierarchical: ClassVar[bool] = True

    def place(
        self,
        load: NDArray[np.float64],
        *,
        num_physical_experts: int,
        topology: Topology,
        num_expert_groups: int,
        current: ExpertMap | None,
    ) -> NDArray[np.int32]:
        slots_per_rank = num_physical_experts // topology.num_ranks
        num_experts = load.shape[2]
        node_ranks = serving_ranks_by_node(topology, num_experts, num_expert_groups, slots_per_rank)
        placed = _place(load.sum(axis=0), node_ranks, num_expert_groups, topology.num_ranks, slots_per_rank)
        if current is None:
            return placed
        placed = keep_ranks(placed, current, node_ranks)
        return _keep_layers(placed, load, current, topology, hierarchical=len(node_ranks) > 1)

    def warm_up(self) -> None:
        super().warm_up()
        topology = Topology(num_ranks=4, num_nodes=2)
        current = ExpertMap.initial(1, 4, topology)
        load = np.array([[[1.0, 5.0, 3.0, 4.0]]])
        self.place(load, num_physical_experts=4, topology=topology, num_expert_groups=2, current=current)


def serving_ranks_by_node(
    topology: Topology, num_logical_experts: int, num_expert_groups: int, slots_per_rank: int
) -> NDArray[np.int64]:
    """[nodes, ranks of a node], the active ranks of each node that has any; one row with all for global.

    Hierarchical placement needs groups that divide evenly onto more than one node, the same number of active
    ranks on each, slots for all experts of a node's groups, and no rank that holds more slots than its node
    has experts while another node's would do.
    """
    active = np.flatnonzero(topology.is_active)
    nodes, ranks_per_node = np.unique(topology.node_of_rank[active], return_counts=True)
    experts_per_node = num_logical_experts // len(nodes)
    hierarchical = (
        len(nodes) > 1
        and num_expert_groups % len(nodes) == 0
        and bool((ranks_per_node == ranks_per_node[0]).all())
        and slots_per_rank <= experts_per_node <= slots_per_rank * int(ranks_per_node[0])
    )
    return active.reshape(len(nodes) if hierarchical else 1, -1).astype(np.int64)


def _place(
    load: NDArray[np.float64],
    node_ranks: NDArray[np.int64],
    num_expert_groups: int,
    num_ranks: int,
    slots_per_rank: int,
) -> NDArray[np.int32]:
    """int32 [layers, physical]: groups on nodes, replicas within each node, replicas on the node's ranks.

    load: [layers, logical]; node_ranks: [nodes, ranks of a node]
    """
    from eplb_platform.algorithms.deepseek_kernels import pack_groups, pack_replicas, replicate

    num_layers, num_experts = load.shape
    num_nodes, ranks_per_node = node_ranks.shape
    node_of_expert = np.zeros((num_layers, num_experts), dtype=np.int64)
    if num_nodes > 1:
        group_load = load.reshape(num_layers, num_expert_groups, -1).sum(axis=2)
        node_of_group = pack_groups(group_load, _heaviest_first(group_load), num_nodes)
        node_of_expert = np.repeat(node_of_group, num_experts // num_expert_groups, axis=1)
    count = replicate(load, node_of_expert, num_nodes, ranks_per_node, slots_per_rank)
    share = load / count
    order = _heaviest_first(share)
    placed = pack_replicas(share, count, order, node_of_expert, node_ranks, num_ranks, slots_per_rank)
    return placed.reshape(num_layers, -1)


def _heaviest_first(load: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ids in descending order of load, row by row; of equal ones the lower id first."""
    return np.argsort(-load, axis=1, kind="stable").astype(np.int64)


def _keep_layers(
    placed: NDArray[np.int32],
    load: NDArray[np.float64],
    current: ExpertMap,
    topology: Topology,
    *,
    hierarchical: bool,
) -> NDArray[np.int32]:
    """`placed` with the current map in the layers that would not be better balanced.

    In hierarchical mode only layers without load stay: the others gain locality, if not balance. Nor does
    a layer stay that wastes a slot on a second replica on one rank.
    """
    if current.topology != topology or current.num_physical_experts != placed.shape[1]:
        return placed
    if hierarchical:
        stays = ~load.any(axis=(0, 2))
    else:
        new = ExpertMap(placed, current.num_logical_experts, topology)
        stays = window_balancedness(current, load) >= window_balancedness(new, load) - _EQUAL_BALANCEDNESS
    stays &= current.same_rank_replicas == 0
    return np.where(stays[:, None], current.physical_to_logical, placed)
