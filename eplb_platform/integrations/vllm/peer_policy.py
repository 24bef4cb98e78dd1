"""vLLM's default EPLB policy as a peer: for `eplb bench`, beside ours in the same run."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

# Without vLLM this fails, and the peer is shown as not installed.
from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

from eplb_platform.algorithms.algorithm import Algorithm
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology


class VllmDefaultPolicy(Algorithm):
    """What vLLM plans by default, called as vLLM calls it: on the load summed over the windows."""

    name: ClassVar[str] = "vllm"
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
        if topology.num_active_ranks != topology.num_ranks:
            raise ValueError("vLLM's default policy knows no inactive ranks")
        placed = DefaultEplbPolicy.rebalance_experts(
            torch.from_numpy(load.sum(axis=0)),
            num_physical_experts,
            num_expert_groups,
            topology.num_nodes,
            topology.num_ranks,
            None if current is None else torch.from_numpy(current.physical_to_logical.astype(np.int64)),
        )
        return np.asarray(placed.numpy(), dtype=np.int32)
