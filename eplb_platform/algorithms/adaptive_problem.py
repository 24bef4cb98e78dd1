"""What the adaptive algorithm searches: load and ranks in the units of its kernels; first placements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eplb_platform.topology import Topology

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Slots = NDArray[np.int32]

# More windows than this are merged with their neighbours: time grows with them, foresight no longer does.
_MOST_WINDOWS = 64
# What stays of the load of an expert that varies in no direction common with others.
_KEPT_NOISE = 0.5
# p of the norm that stands for the maximum, as a power of two, where windows carry no noise.
_MOST_SQUARINGS = 8


@dataclass(frozen=True)
class Problem:
    """Active ranks only; the mean rank takes time 1 in every window.

    raw, load: [layers, experts, windows], as it was and with noise damped; weight: [layers, windows], each
    window's share of the tokens; squarings: [layers], of the norm's p
    ranks, node, zone, slowness: [active ranks], the rank's number, its node, its zone (a node to which expert
    groups keep, or all ranks), and its time for what a rank of mean speed computes in 1
    """

    raw: Floats
    load: Floats
    weight: Floats
    squarings: Ids
    has_load: NDArray[np.bool_]
    num_ranks_of_all: int
    slots_per_rank: int
    num_expert_groups: int
    num_zones: int
    ranks: Ids
    node: Ids
    zone: Ids
    slowness: Floats

    @property
    def num_layers(self) -> int:
        return len(self.raw)

    @property
    def num_experts(self) -> int:
        return int(self.raw.shape[1])

    @property
    def num_slots(self) -> int:
        """Slots of a layer on active ranks."""
        return len(self.ranks) * self.slots_per_rank

    @property
    def node_ranks(self) -> Ids:
        """[zones, ranks of a zone], the ranks' numbers."""
        return self.ranks.reshape(self.num_zones, -1)

    def of_layers(self, layers: Ids) -> Problem:
        return replace(
            self,
            raw=self.raw[layers],
            load=self.load[layers],
            weight=self.weight[layers],
            squarings=self.squarings[layers],
            has_load=self.has_load[layers],
        )

    def slots_of(self, physical_to_logical: Slots) -> Slots:
        """[layers, active ranks, slots], a writable copy of [layers, physical]."""
        by_rank = physical_to_logical.reshape(len(physical_to_logical), self.num_ranks_of_all, -1)
        return np.ascontiguousarray(np.take(by_rank, self.ranks, axis=1), dtype=np.int32)

    def whole(self, slots: Slots) -> Slots:
        """[layers, physical], -1 on inactive ranks; slots: [layers, active ranks, slots]"""
        whole = np.full((len(slots), self.num_ranks_of_all, self.slots_per_rank), -1, dtype=np.int32)
        whole[:, self.ranks] = slots
        return whole.reshape(len(slots), -1)

    def zones_of(self, slots: Slots) -> tuple[Ids, NDArray[np.bool_]]:
        """The zone of each expert, [layers, experts], and whether each layer's groups keep to one zone, as
        many in each, [layers]. slots: [layers, active ranks, slots], -1 where there is nothing
        """
        num_layers = len(slots)
        zones_of = np.zeros((num_layers, self.num_experts + 1), dtype=np.int64)
        if self.num_zones == 1:
            return zones_of[:, :-1].copy(), np.ones(num_layers, np.bool_)
        layers = np.arange(num_layers)[:, None, None]
        zones_of[layers, slots] = self.zone[None, :, None]
        alone = (zones_of[layers, slots] == self.zone[None, :, None]) | (slots < 0)
        zones_of = zones_of[:, :-1].copy()
        by_group = zones_of.reshape(num_layers, self.num_expert_groups, -1)
        in_zone = (by_group[:, :, 0, None] == np.arange(self.num_zones)).sum(axis=1)
        keeps = alone.all(axis=(1, 2)) & (by_group == by_group[:, :, :1]).all(axis=(1, 2))
        return zones_of, keeps & (in_zone == self.num_expert_groups // self.num_zones).all(axis=1)

    def greedy(self, damping: float) -> tuple[Slots, Ids]:
        """DeepSeek's placement of the mean load: [layers, active ranks, slots], and each expert's zone.

        damping: replicas are counted out on load ** damping; below 1, the hottest experts get fewer
        """
        from eplb_platform.algorithms.deepseek_kernels import pack_groups, pack_replicas, replicate

        load = np.einsum("lew,lw->le", self.raw, self.weight)
        num_ranks, num_zones = len(self.ranks), self.num_zones
        zones_of = np.zeros(load.shape, dtype=np.int64)
        if num_zones > 1:
            by_group = load.reshape(len(load), self.num_expert_groups, -1).sum(axis=2)
            zone_of_group = pack_groups(by_group, _heaviest_first(by_group), num_zones)
            zones_of = np.repeat(zone_of_group, self.num_experts // self.num_expert_groups, axis=1)
        ranks_per_zone = num_ranks // num_zones
        counted = load if damping == 1 else load**damping
        count = replicate(counted, zones_of, num_zones, ranks_per_zone, self.slots_per_rank)
        share = load / count
        places = np.arange(num_ranks).reshape(num_zones, ranks_per_zone)
        slots = pack_replicas(
            share, count, _heaviest_first(share), zones_of, places, num_ranks, self.slots_per_rank
        )
        return slots, zones_of


def make_problem(
    load: Floats,
    slots_per_rank: int,
    topology: Topology,
    num_expert_groups: int,
    node_ranks: Ids,
    rank_speed: Sequence[float] | None,
) -> Problem:
    """The problem of placing `load` [windows, layers, logical] on `node_ranks` [zones, ranks of a zone].

    Raises ValueError where `rank_speed` has another length than the ranks.
    """
    from eplb_platform.algorithms.noise_kernels import smooth_layers

    ranks = node_ranks.reshape(-1)
    slowness = np.ones(len(ranks))
    if rank_speed is not None:
        if len(rank_speed) != topology.num_ranks:
            raise ValueError(
                f"rank_speed has {len(rank_speed)} values, expected {topology.num_ranks}, one for each rank"
            )
        speed = np.array(rank_speed, dtype=np.float64)[ranks]
        slowness = speed.mean() / speed
    raw, weight = _in_mean_rank_loads(_merged(load), float((1 / slowness).sum()))
    smooth, squarings = smooth_layers(raw, weight, len(ranks), _KEPT_NOISE, _MOST_SQUARINGS)
    return Problem(
        raw=raw,
        load=smooth,
        weight=weight,
        squarings=squarings,
        has_load=np.asarray(load.any(axis=(0, 2))),
        num_ranks_of_all=topology.num_ranks,
        slots_per_rank=slots_per_rank,
        num_expert_groups=num_expert_groups,
        num_zones=len(node_ranks),
        ranks=ranks,
        node=topology.node_of_rank[ranks].astype(np.int64),
        zone=np.repeat(np.arange(len(node_ranks)), node_ranks.shape[1]).astype(np.int64),
        slowness=slowness,
    )


def _heaviest_first(load: Floats) -> Ids:
    """Ids in descending order of load, row by row; of equal ones the lower id first."""
    return np.argsort(-load, axis=1, kind="stable").astype(np.int64)


def _merged(load: Floats) -> Floats:
    """`load` [windows, layers, logical] with neighbours added up until there are at most _MOST_WINDOWS."""
    together = -(-len(load) // _MOST_WINDOWS)
    if together == 1:
        return load
    return np.add.reduceat(load, np.arange(0, len(load), together), axis=0)


def _in_mean_rank_loads(load: Floats, total_speed: float) -> tuple[Floats, Floats]:
    """[layers, experts, windows] in mean rank loads of each window, and the windows' shares of all tokens,
    [layers, windows]. In a layer without any load all experts are alike. load: [windows, layers, logical]
    """
    largest = load.max(axis=(0, 2), keepdims=True)
    # By the largest first: tokens of any size have a sum.
    load = np.where(largest > 0, load / np.where(largest > 0, largest, 1.0), 1.0)
    mean = load.sum(axis=2) / total_speed
    relative = load / np.where(mean > 0, mean, 1.0)[:, :, None]
    weight = mean / mean.sum(axis=0)
    return np.ascontiguousarray(relative.transpose(1, 2, 0)), np.ascontiguousarray(weight.T)
