"""What the balancer must know of vLLM's expert-parallel group: ranks, nodes, stages, a store to agree on."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from eplb_platform.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore
    from vllm.config import VllmConfig

STORE_TIMEOUT = timedelta(minutes=30)
"""Ranks load their weights at their own pace, and meet in the store afterwards."""


@dataclass(frozen=True)
class ExpertParallelGroup:
    """One rank's view of the group; under pipeline parallelism every stage has a group of its own."""

    rank: int
    topology: Topology
    engine_store: TCPStore
    """Shared by all ranks of all stages."""
    stage: int
    num_stages: int
    counts_tokens: bool
    """Whether this rank's counts are its own: ranks of one tensor-parallel group route the same tokens."""

    @classmethod
    def join(cls, vllm_config: VllmConfig) -> ExpertParallelGroup:
        """Every rank of the engine calls it once, after vLLM has set up its groups."""
        from vllm.distributed.parallel_state import (
            get_ep_group,
            get_pp_group,
            get_tp_group,
            get_world_group,
        )

        experts, stages, world = get_ep_group(), get_pp_group(), get_world_group()
        hosts = _gather(socket.gethostname(), experts)
        parallel = vllm_config.parallel_config
        counts = get_tp_group().rank_in_group == 0 or getattr(parallel, "use_sequence_parallel_moe", False)
        return cls(
            rank=experts.rank_in_group,
            topology=Topology(experts.world_size, _num_nodes(hosts)),
            engine_store=_new_store(world),
            stage=stages.rank_in_group,
            num_stages=stages.world_size,
            counts_tokens=bool(counts),
        )

    @property
    def store(self) -> Store:
        """For the ranks of this stage."""
        from torch.distributed import PrefixStore

        return PrefixStore(f"stage-{self.stage}", self.engine_store)

    def publish_layers(self, num_layers: int) -> None:
        """Tell the other stages how many MoE layers this one has; every stage does, one without them too."""
        self.engine_store.compare_set(f"layers/{self.stage}", "", str(num_layers))

    def layers_of_stages(self) -> list[int]:
        """MoE layers of every stage; waits until all have published theirs."""
        return [int(self.engine_store.get(f"layers/{stage}")) for stage in range(self.num_stages)]

    def wait_for_all(self, what: str) -> None:
        """Return when every rank of this stage has called it with the same word."""
        store, done = self.store, f"all/{what}"
        if store.add(f"count/{what}", 1) == self.topology.num_ranks:
            store.set(done, "yes")
        store.get(done)


def _gather(value: Any, group: Any) -> list[Any]:
    """The value of every rank of a vLLM group, by rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * group.world_size
    dist.all_gather_object(values, value, group=group.cpu_group)
    return values


def _num_nodes(hosts: list[str]) -> int:
    """Nodes that each hold a run of neighbouring ranks as `Topology` has them; else one, to plan without."""
    nodes = len(set(hosts))
    host_of_node: dict[int, str] = {}
    for host, node in zip(hosts, Topology(len(hosts), nodes).node_of_rank.tolist(), strict=True):
        if host_of_node.setdefault(node, host) != host:
            return 1
    return nodes


def _new_store(world: Any) -> TCPStore:
    """A store of our own, on the first rank: vLLM's may end before us, and stateless groups have none."""
    from torch.distributed import TCPStore
    from vllm.utils.network_utils import get_ip

    hosts = _gather(socket.gethostname(), world)
    address: tuple[str, int] = ("", 0)
    store: TCPStore | None = None
    if world.rank_in_group == 0:
        host = "127.0.0.1" if len(set(hosts)) == 1 else get_ip()
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
        address = host, store.port
    host, port = _gather(address, world)[0]
    return store or TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT)
