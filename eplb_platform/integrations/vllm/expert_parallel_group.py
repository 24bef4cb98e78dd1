"""What the balancer must know of vLLM's expert-parallel group: ranks, nodes, a store of their own."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eplb_platform.topology import Topology

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed import TCPStore
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class ExpertParallelGroup:
    """One rank's view of the group; under pipeline parallelism every stage has a group of its own."""

    rank: int
    topology: Topology
    store: TCPStore
    stage: int
    num_stages: int
    counts_tokens: bool
    """Whether this rank's counts are its own: ranks of one tensor-parallel group route the same tokens."""

    @classmethod
    def join(cls, vllm_config: VllmConfig, timeout: timedelta) -> ExpertParallelGroup:
        """Every rank of the engine calls it once, after vLLM has set up its groups."""
        from vllm.distributed.parallel_state import get_ep_group, get_pp_group, get_tp_group

        group, stages = get_ep_group(), get_pp_group()
        hosts = gather(socket.gethostname(), group.cpu_group, group.world_size)
        parallel = vllm_config.parallel_config
        counts = get_tp_group().rank_in_group == 0 or getattr(parallel, "use_sequence_parallel_moe", False)
        return cls(
            rank=group.rank_in_group,
            topology=Topology(group.world_size, _num_nodes(hosts)),
            store=_store(group, is_one_node=len(set(hosts)) == 1, timeout=timeout),
            stage=stages.rank_in_group,
            num_stages=stages.world_size,
            counts_tokens=bool(counts),
        )


def gather(value: Any, group: Any, num_ranks: int) -> list[Any]:
    """The value of every rank of a torch process group on the host."""
    import torch.distributed as dist

    values: list[Any] = [None] * num_ranks
    dist.all_gather_object(values, value, group=group)
    return values


def _num_nodes(hosts: list[str]) -> int:
    """Nodes that each hold a run of equally many neighbouring ranks; else one, which plans without them."""
    nodes = len(set(hosts))
    topology = Topology(len(hosts), nodes)
    names: dict[int, str] = {}
    for host, node in zip(hosts, topology.node_of_rank.tolist(), strict=True):
        if names.setdefault(node, host) != host:
            return 1
    return nodes


def _store(group: Any, *, is_one_node: bool, timeout: timedelta) -> TCPStore:
    """A store of our own, on the first rank: vLLM's may end before us, and stateless groups have none."""
    from torch.distributed import TCPStore
    from vllm.utils.network_utils import get_ip

    address: tuple[str, int] = ("", 0)
    store: TCPStore | None = None
    if group.rank_in_group == 0:
        host = "127.0.0.1" if is_one_node else get_ip()
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        address = host, store.port
    host, port = gather(address, group.cpu_group, group.world_size)[0]
    return store or TCPStore(host, port, is_master=False, timeout=timeout)
