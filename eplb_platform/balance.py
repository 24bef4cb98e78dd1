"""The measures of a placement: rank load, balancedness, imbalance ratio, moved experts, lower bounds.

Everything here is on the level of ranks, and replicas of an expert share its load evenly.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

_Floats: TypeAlias = NDArray[np.float64]

# A lower bound is shrunk by this much, so that rounding never lifts it above a map that attains it.
_ROUNDING = 1e-12


def rank_load(expert_map: ExpertMap, load: ArrayLike) -> _Floats:
    """[..., layers, ranks], the tokens that each rank computes; none on inactive ranks.

    load: [..., layers, logical], tokens per logical expert; windows or steps may stand in front
    """
    tokens = np.asarray(load, dtype=np.float64)
    expected = (expert_map.num_layers, expert_map.num_logical_experts)
    if tokens.shape[-2:] != expected:
        raise ValueError(f"load has shape {list(tokens.shape)}, expected [..., {expected[0]}, {expected[1]}]")
    replica_load = tokens / expert_map.replica_count
    layers = np.arange(expert_map.num_layers)[:, None]
    slot_load = replica_load[..., layers, expert_map.physical_to_logical]
    slot_load[..., expert_map.physical_to_logical < 0] = 0.0
    by_rank = slot_load.reshape(
        *slot_load.shape[:-1], expert_map.topology.num_ranks, expert_map.slots_per_rank
    )
    return np.asarray(by_rank.sum(axis=-1))


def balancedness(rank_load: ArrayLike, topology: Topology | None = None) -> _Floats:
    """[..., layers], mean / max over the active ranks: 1 is perfect, also for a layer without load.

    rank_load: [..., layers, ranks]
    topology: says which ranks are active, all by default
    """
    mean, hottest = _mean_and_max(rank_load, topology)
    return mean_over_max(mean, hottest)


def window_balancedness(expert_map: ExpertMap, load: ArrayLike) -> _Floats:
    """[layers], the unit of a plan: sum over windows of mean rank load / sum over windows of max rank load.

    load: [windows, layers, logical] or [layers, logical], tokens per logical expert
    """
    return mean_over_max(*window_rank_load(expert_map, load))


def window_rank_load(expert_map: ExpertMap, load: ArrayLike) -> tuple[_Floats, _Floats]:
    """Mean and maximum over the active ranks, both [layers], summed over the windows.

    load: [windows, layers, logical] or [layers, logical], tokens per logical expert
    """
    windows = as_windows(load)
    mean, hottest = _mean_and_max(rank_load(expert_map, windows), expert_map.topology)
    return mean.sum(axis=0), hottest.sum(axis=0)


def imbalance_ratio(rank_load: ArrayLike, topology: Topology | None = None) -> _Floats:
    """[..., layers], (max - mean) / mean over the active ranks: 0 is perfect, also for a layer without load.

    rank_load: [..., layers, ranks]
    topology: says which ranks are active, all by default
    """
    mean, hottest = _mean_and_max(rank_load, topology)
    return np.divide(hottest - mean, mean, out=np.zeros_like(mean), where=mean > 0)


def moved_experts(old: ExpertMap, new: ExpertMap) -> NDArray[np.int64]:
    """[layers], the (rank, expert) pairs of `new` that are not in `old`: experts that a rank must receive.

    Raises ValueError when the maps differ in layers, logical experts or ranks; slots may differ.
    """
    shapes = [(m.num_layers, m.num_logical_experts, m.topology.num_ranks) for m in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the maps differ in [layers, logical experts, ranks]: {shapes[0]} and {shapes[1]}")
    return np.asarray((_held(new) & ~_held(old)).sum(axis=(1, 2)), dtype=np.int64)


def lower_bound(
    load: ArrayLike, num_physical_experts: int, topology: Topology, num_expert_groups: int = 1
) -> _Floats:
    """[layers], no valid map has (sum over windows of max / sum over windows of mean) rank load below it.

    load: [windows, layers, logical] or [layers, logical], tokens per logical expert
    num_physical_experts: slots of all ranks, inactive ones included
    num_expert_groups: above 1, only maps count that keep every group of neighbouring experts on one node, as
        many on each; a multiple of the nodes with active ranks, all of which have as many of them

    At least 1, so `window_balancedness <= 1 / lower_bound`. Neither the windows one by one nor their sum
    can be served better than each allows by itself; the larger bound counts. Raises ValueError when the
    slots cannot hold the experts.
    """
    windows = as_windows(load)
    ranks = topology.num_active_ranks
    slots_per_rank, left_over = divmod(num_physical_experts, topology.num_ranks)
    if left_over or slots_per_rank * ranks < windows.shape[-1]:
        raise ValueError(
            f"{num_physical_experts} physical experts on {topology.num_ranks} ranks ({ranks} active) "
            f"cannot hold {windows.shape[-1]} logical experts"
        )
    total = windows.sum(axis=0)
    hottest = np.maximum(
        _hottest_rank_bound(windows, ranks, slots_per_rank).sum(axis=0),
        _hottest_rank_bound(total, ranks, slots_per_rank),
    )
    if num_expert_groups > 1:
        nodes = len(set(topology.node_of_rank[topology.is_active].tolist()))
        hottest = np.maximum(
            hottest,
            np.maximum(
                _hottest_node_bound(windows, num_expert_groups, nodes).sum(axis=0),
                _hottest_node_bound(total, num_expert_groups, nodes),
            )
            / (ranks // nodes),
        )
    mean = total.sum(axis=-1) / ranks
    bound = np.divide(hottest, mean, out=np.ones_like(mean), where=mean > 0)
    return np.asarray(np.maximum(bound * (1 - _ROUNDING), 1.0))


def as_windows(load: ArrayLike) -> _Floats:
    """`load` as [windows, layers, logical]; [layers, logical] is one window. Raises ValueError otherwise."""
    windows = np.asarray(load, dtype=np.float64)
    if windows.ndim == 2:
        windows = windows[None]
    if windows.ndim != 3 or 0 in windows.shape[1:]:
        raise ValueError(
            f"load has shape {list(windows.shape)}, expected [layers, logical] or [windows, layers, logical]"
        )
    return windows


def _mean_and_max(rank_load: ArrayLike, topology: Topology | None) -> tuple[_Floats, _Floats]:
    """Both [..., layers], over the active ranks."""
    loads = np.asarray(rank_load, dtype=np.float64)
    if topology is not None:
        if loads.shape[-1] != topology.num_ranks:
            raise ValueError(f"rank load has {loads.shape[-1]} ranks, expected {topology.num_ranks}")
        loads = loads[..., topology.is_active]
    return loads.mean(axis=-1), loads.max(axis=-1)


def mean_over_max(mean: _Floats, hottest: _Floats) -> _Floats:
    """mean / hottest, 1 without load; rounding may have lifted the mean above the maximum."""
    return np.minimum(np.divide(mean, hottest, out=np.ones_like(mean), where=hottest > 0), 1.0)


def _held(expert_map: ExpertMap) -> NDArray[np.bool_]:
    """[layers, ranks, logical], whether the rank holds the expert."""
    shape = (expert_map.num_layers, expert_map.topology.num_ranks, expert_map.num_logical_experts + 1)
    held = np.zeros(shape, dtype=np.bool_)
    layers, ranks = np.ogrid[: shape[0], : shape[1]]
    # The -1 of inactive ranks falls into a last column of its own.
    held[layers[:, :, None], ranks[:, :, None], expert_map.by_rank()] = True
    return held[:, :, :-1]


def _hottest_rank_bound(load: _Floats, ranks: int, slots_per_rank: int) -> _Floats:
    """[...], tokens that the hottest rank computes at least; load: [..., logical]."""
    redundant = ranks * slots_per_rank - load.shape[-1]
    mean = load.sum(axis=-1) / ranks
    shared = _shared_rank_bound(load, ranks, slots_per_rank)
    replica = _hottest_replica_bound(load, mean, ranks, redundant)
    return np.asarray(np.maximum(np.maximum(mean, shared), replica))


def _hottest_node_bound(load: _Floats, num_groups: int, num_nodes: int) -> _Floats:
    """[...], tokens that the hottest node computes at least, which gets as many expert groups as any other.

    load: [..., logical]
    """
    by_group = load.reshape(*load.shape[:-1], num_groups, -1).sum(axis=-1)
    bound = np.maximum(
        _shared_rank_bound(by_group, num_nodes, num_groups // num_nodes), by_group.sum(axis=-1) / num_nodes
    )
    if num_groups == 2 * num_nodes:
        # The i hottest cannot all be with one of the i - 1 coldest: some pair is as hot as this for every i.
        hottest_first = -np.sort(-by_group, axis=-1)
        bound = np.maximum(bound, (hottest_first + hottest_first[..., ::-1]).max(axis=-1))
    return np.asarray(bound)


def _shared_rank_bound(load: _Floats, ranks: int, slots_per_rank: int) -> _Floats:
    """[...], a bound by pigeonholes.

    At most `redundant` experts are replicated, so of the hottest k * ranks + 1 + redundant experts at least
    k * ranks + 1 are whole, and k + 1 of these share a rank. Without redundancy its other slots hold experts
    too, at best the coldest.
    """
    num_experts = load.shape[-1]
    redundant = ranks * slots_per_rank - num_experts
    # sums[n]: the load of the n hottest experts
    sums = np.zeros((*load.shape[:-1], num_experts + 1))
    np.cumsum(-np.sort(-load, axis=-1), axis=-1, out=sums[..., 1:])
    together = np.arange(1, slots_per_rank + 1)
    pool = (together - 1) * ranks + 1 + redundant
    together, pool = together[pool <= num_experts], pool[pool <= num_experts]
    if not together.size:
        return np.zeros(load.shape[:-1])
    bound = sums[..., pool] - sums[..., pool - together]
    if redundant == 0:
        bound += sums[..., -1:] - sums[..., num_experts - (slots_per_rank - together)]
    return np.asarray(bound.max(axis=-1))


def _hottest_replica_bound(load: _Floats, mean: _Floats, ranks: int, redundant: int) -> _Floats:
    """[...], the hottest replica when the redundant slots lower it most; 0 where it cannot exceed the mean.

    mean: [...], the mean rank load
    """
    if redundant >= ranks:
        # Then every expert can have 1 + floor(load / mean) replicas, none above the mean.
        return np.zeros_like(mean)
    load = load.reshape(-1, load.shape[-1])
    replicas = np.ones_like(load)
    replica_load = load.copy()
    rows = np.arange(load.shape[0])
    for _ in range(redundant):
        # Giving the next slot to the hottest replica is optimal: no other choice lowers the maximum.
        hottest = replica_load.argmax(axis=-1)
        replicas[rows, hottest] += 1
        replica_load[rows, hottest] = load[rows, hottest] / replicas[rows, hottest]
    return np.asarray(replica_load.max(axis=-1).reshape(mean.shape))
