"""How long a forward pass takes, estimated from the work of the ranks and a hardware profile.

Of one layer, with all ranks r waiting for the slowest:

    layer     = max over r of (transfer(r) + experts(r)) + latencies + other + layer_overhead
    transfer  = tokens(r) * (dispatch + combine bytes of a token)
                * max(share of tokens from this node / bandwidth in it, share from others / bandwidth between)
    experts   = prefill: tokens(r) * 2 * parameters of an expert / FLOP/s        (compute-bound)
                decode:  activated(r) * bytes of an expert / memory bandwidth    (memory-bound)
                mixed:   the larger
    other     = attention and shared experts on the mean rank's own tokens, by the same rule

Tokens come from every rank alike; one that is sent to two experts of a rank travels twice. Not in it: the
KV cache, which grows with the context and not with the placement, and any overlap of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.migration.schedule import Chunk
from eplb_platform.offline.hardware import HardwareProfile
from eplb_platform.topology import Topology

_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RankWork:
    """What the ranks have to do in one pass, both [layers, ranks].

    tokens: pairs of a token and an expert that the rank computes
    activated: slots with at least one token; one with less than a token counts as that part
    """

    tokens: _Floats
    activated: _Floats

    @property
    def balancedness(self) -> float:
        """Mean / max rank load, averaged over the layers with load; 1 without load."""
        hottest = self.tokens.max(axis=1)
        served = hottest > 0
        if not served.any():
            return 1.0
        return float((self.tokens.mean(axis=1)[served] / hottest[served]).mean())


def even_shares(expert_map: ExpertMap) -> _Floats:
    """[layers, physical], the part of its expert's tokens that each slot takes; 0 without an expert."""
    slots = expert_map.physical_to_logical
    layers = np.arange(expert_map.num_layers)[:, None]
    return np.where(slots < 0, 0.0, 1.0 / expert_map.replica_count[layers, slots])


def rank_work(load: ArrayLike, expert_map: ExpertMap, share: _Floats | None = None) -> RankWork:
    """The work of one pass. load: [layers, logical] tokens; share: [layers, physical], even by default."""
    from eplb_platform.offline import step_time_kernels  # late: numba takes a third of a second to import

    ranks = expert_map.topology.num_ranks
    shape = (expert_map.num_layers, ranks)
    work = RankWork(np.empty(shape), np.empty(shape))
    step_time_kernels.rank_work(
        np.ascontiguousarray(load, dtype=np.float64),
        np.array(expert_map.physical_to_logical),
        even_shares(expert_map) if share is None else share,
        ranks,
        work.tokens,
        work.activated,
    )
    return work


class StepTime:
    """Times, in seconds, on ranks of one kind of device that stand on nodes as `topology` says."""

    def __init__(self, profile: HardwareProfile, topology: Topology) -> None:
        self.profile = profile
        self._nodes = topology.node_of_rank
        on_node = np.bincount(self._nodes)[self._nodes]
        ranks = topology.num_ranks
        links = profile.links
        self._spans_nodes = topology.num_nodes > 1
        # Of a byte for every token: the wider link is idle while the narrower one works.
        self._link_seconds = np.maximum(
            (on_node - 1) / ranks / links.intra_node_bandwidth,
            (ranks - on_node) / ranks / links.inter_node_bandwidth,
        )
        latency = 0.0 if ranks == 1 else links.intra_node_latency_us
        self._latency_s = (links.inter_node_latency_us if self._spans_nodes else latency) * 1e-6

    def step(self, work: RankWork, phase: Phase, *, free_links: float = 1.0) -> float:
        """Of a whole pass. free_links: the part of the links that migration leaves."""
        return float(self.layers(work, phase, free_links=free_links).sum())

    def layers(self, work: RankWork, phase: Phase, *, free_links: float = 1.0) -> _Floats:
        """[layers], of each layer of a pass; 0 for a layer without a token."""
        slowest = (self.transfer(work) / free_links + self.experts(work, phase)).max(axis=1)
        overhead = 2 * self._latency_s + self.profile.device.layer_overhead_us * 1e-6
        seconds = slowest + self.other(work, phase) + overhead
        return np.asarray(np.where(work.tokens.any(axis=1), seconds, 0.0))

    def transfer(self, work: RankWork) -> _Floats:
        """[layers, ranks], dispatch and combine, without latencies."""
        model = self.profile.model
        token_bytes = model.hidden_size * (model.dispatch_bytes_per_value + model.combine_bytes_per_value)
        return np.asarray(work.tokens * (token_bytes * self._link_seconds))

    def experts(self, work: RankWork, phase: Phase) -> _Floats:
        """[layers, ranks], the experts' matrix products."""
        device, model = self.profile.device, self.profile.model
        return _by_phase(
            phase,
            compute=work.tokens * (2 * model.expert_parameters / device.flops),
            memory=work.activated * (model.expert_bytes / device.memory_bandwidth),
        )

    def other(self, work: RankWork, phase: Phase) -> _Floats:
        """[layers], attention and shared experts, level on all ranks."""
        device, model = self.profile.device, self.profile.model
        own_tokens = work.tokens.mean(axis=1) / model.experts_per_token
        read = model.other_parameters * model.bytes_per_weight / device.memory_bandwidth
        return _by_phase(
            phase,
            compute=own_tokens * (2 * model.other_parameters / device.flops),
            memory=np.full_like(own_tokens, read),
        )

    def fetch(self, chunk: Chunk) -> float:
        """Of moving a chunk's experts into staging: the busiest link, one way, of any rank."""
        links = self.profile.links
        slots, ranks = chunk.map_after.slots_per_rank, chunk.map_after.topology.num_ranks
        source, target = chunk.source // slots, chunk.target // slots
        remote = self._nodes[source] != self._nodes[target]
        experts = 0.0
        for which, bandwidth in (
            (~remote & (source != target), links.intra_node_bandwidth),
            (remote, links.inter_node_bandwidth),
        ):
            for end in (source, target):
                busiest = np.bincount(end[which], minlength=ranks).max()
                experts = max(experts, float(busiest) / bandwidth)
        latency = self._latency_s if (source != target).any() else 0.0
        return experts * self.profile.model.expert_bytes / links.migration_share + latency

    def swap(self, chunk: Chunk) -> float:
        """Of copying a chunk's experts from staging into their slots, which the forward pass waits for."""
        arrivals = int(chunk.receives_by_rank().max(initial=0))
        return 2 * arrivals * self.profile.model.expert_bytes / self.profile.device.memory_bandwidth


def _by_phase(phase: Phase, *, compute: _Floats, memory: _Floats) -> _Floats:
    if phase is Phase.PREFILL:
        return compute
    return memory if phase is Phase.DECODE else np.maximum(compute, memory)
