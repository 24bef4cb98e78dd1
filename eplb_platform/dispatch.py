"""Which replica takes a token: the tables that routing reads.

A table has a row of physical experts for each logical one, and the number of its entries in use; routing
sends a token to entry (hash of its row) % count. An entry may be repeated: so a replica takes any share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_platform.balance import as_windows
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology


def even_table(expert_map: ExpertMap, width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tables by which the replicas of an expert share its tokens evenly.

    width: entries of a row, fixed for the life of a device table; at least the most replicas of an expert.

    Returns the physical experts of each logical one, [layers, logical, width], ascending and padded with -1,
    and how many each has, [layers, logical]. Token t of expert e goes to entry t % count of e's row.
    Raises ValueError when an expert has more than `width` replicas.
    """
    return expert_map.logical_to_physical_padded(width), expert_map.replica_count


def local_table(expert_map: ExpertMap, width: int, rank: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tables for tokens that start on `rank`: to the replicas on that rank, else to those on its node, else
    to all, evenly among them.

    width: entries of a row, fixed for the life of a device table; at least the most replicas of an expert.

    Returns tables as `even_table` does, but every rank begins its rows with another replica, because all
    ranks number their tokens from 0. Raises ValueError for an unknown or inactive rank, and when an expert
    has more than `width` replicas.
    """
    from eplb_platform.dispatch_table_kernels import fill_local_table

    topology = expert_map.topology
    if not 0 <= rank < topology.num_ranks or not topology.is_active[rank]:
        raise ValueError(f"rank is {rank}, expected an active one of {topology.num_ranks} ranks")
    table, count = _empty_table(expert_map, width)
    fill_local_table(expert_map.physical_to_logical.copy(), rank, topology.node_of_rank.copy(), table, count)
    return table, count


def replica_shares(expert_map: ExpertMap, load: ArrayLike) -> NDArray[np.float64]:
    """[layers, physical], the part of its expert's tokens that each slot takes so that the ranks are level.

    load: [layers, logical] or [windows, layers, logical], tokens; shares are made for the sum over windows

    No other shares have a cooler hottest rank, nor, beside it, a cooler second one, and so on. The hottest
    is as cool as (load of the experts that only some ranks hold) / (these ranks) allows for every such set.
    Shares of an expert sum to 1, those of slots on inactive ranks are 0, and an expert without load is
    shared evenly by its ranks. Of two replicas on one rank the first takes all. Raises ValueError for load
    of another shape, that is negative or not finite.
    """
    from eplb_platform.dispatch_share_kernels import level_shares

    topology = expert_map.topology
    return level_shares(
        _tokens(expert_map, load),
        expert_map.physical_to_logical.copy(),
        np.array(topology.active_ranks, dtype=np.int64),
        topology.num_ranks,
    )


@dataclass(frozen=True, eq=False)
class WeightedTable:
    """A table of repeated entries, with what it aims at and what it attains on the load it was made for.

    logical_to_physical: int32 [layers, logical, width], padded with -1
    count: int32 [layers, logical], entries in use
    shares: [layers, physical], the exact shares; realised_shares: those of the table
    exact_rank_load: [layers, ranks], tokens with exact shares; rank_load: with the table
    """

    logical_to_physical: NDArray[np.int32]
    count: NDArray[np.int32]
    shares: NDArray[np.float64]
    realised_shares: NDArray[np.float64]
    exact_rank_load: NDArray[np.float64]
    rank_load: NDArray[np.float64]

    @property
    def rounding_loss(self) -> NDArray[np.float64]:
        """[layers], by which part the hottest rank is hotter than with exact shares; 0 without load."""
        exact, realised = self.exact_rank_load.max(axis=1), self.rank_load.max(axis=1)
        loss = np.divide(realised - exact, exact, out=np.zeros_like(exact), where=exact > 0)
        return np.asarray(loss)


def weighted_table(expert_map: ExpertMap, load: ArrayLike, width: int) -> WeightedTable:
    """The table whose repeated entries come nearest to `replica_shares`, which level the ranks.

    load: [layers, logical] or [windows, layers, logical], tokens
    width: entries of a row, fixed for the life of a device table; at least the most replicas of an expert

    What rounding the hotter experts leaves on the ranks, the cooler ones make good. The entries of a replica
    lie as far apart as can be, so that neighbouring tokens spread. Same input, same table. Raises ValueError
    as `replica_shares`, and when an expert has more than `width` replicas.
    """
    from eplb_platform.dispatch_table_kernels import fill_tables

    tokens = _tokens(expert_map, load)
    table, count = _empty_table(expert_map, width)
    shares = replica_shares(expert_map, tokens)
    order = np.argsort(-tokens, axis=1, kind="stable").astype(np.int64)
    fill_tables(
        shares,
        tokens,
        expert_map.physical_to_logical.copy(),
        order,
        expert_map.topology.num_ranks,
        table,
        count,
    )
    realised = table_shares(expert_map, table, count)
    return WeightedTable(
        table,
        count,
        shares,
        realised,
        shared_rank_load(expert_map, tokens, shares),
        shared_rank_load(expert_map, tokens, realised),
    )


def table_shares(expert_map: ExpertMap, table: ArrayLike, count: ArrayLike) -> NDArray[np.float64]:
    """[layers, physical], the part of its expert's tokens that each slot takes by a table.

    table: [layers, logical, width]; count: [layers, logical], entries in use. Both as made for this map.
    """
    from eplb_platform.dispatch_table_kernels import count_shares

    return count_shares(
        np.array(table, dtype=np.int32, order="C"),
        np.array(count, dtype=np.int32, order="C"),
        expert_map.physical_to_logical.copy(),
    )


def shared_rank_load(expert_map: ExpertMap, load: ArrayLike, shares: ArrayLike) -> NDArray[np.float64]:
    """[..., layers, ranks], the tokens that each rank computes when its slots take `shares`.

    load: [..., layers, logical], tokens; windows or steps may stand in front
    shares: [layers, physical], parts of the experts' tokens
    """
    tokens = np.asarray(load, dtype=np.float64)
    held = expert_map.physical_to_logical
    parts = np.where(held < 0, 0.0, np.asarray(shares, dtype=np.float64))
    slot_load = tokens[..., np.arange(expert_map.num_layers)[:, None], held] * parts
    return np.asarray(
        slot_load.reshape(
            *slot_load.shape[:-1], expert_map.topology.num_ranks, expert_map.slots_per_rank
        ).sum(axis=-1)
    )


def warm_up() -> None:
    """Compile what the tables need, so that the first ones in service do not wait for it."""
    expert_map = ExpertMap.initial(1, 2, Topology(2), 2)
    weighted_table(expert_map, [[3, 1]], 4)
    local_table(expert_map, 2, 0)


def _tokens(expert_map: ExpertMap, load: ArrayLike) -> NDArray[np.float64]:
    """[layers, logical], the sum over windows of a load that was checked."""
    windows = as_windows(load)
    expected = (expert_map.num_layers, expert_map.num_logical_experts)
    if windows.shape[1:] != expected:
        raise ValueError(f"load has {windows.shape[1:]} [layers, logical], expected {expected} of the map")
    wrong = np.argwhere(~np.isfinite(windows) | (windows < 0))
    if len(wrong):
        window, layer, expert = wrong[0]
        raise ValueError(
            f"load of layer {layer}, expert {expert}, window {window} is {windows[window, layer, expert]}, "
            "expected a finite number of tokens of at least 0"
        )
    return np.ascontiguousarray(windows.sum(axis=0))


def _empty_table(expert_map: ExpertMap, width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """A table of -1 that every expert's replicas fit in, and its counts."""
    most = expert_map.replica_count.max()
    if width < most:
        layer, expert = np.argwhere(expert_map.replica_count == most)[0]
        raise ValueError(
            f"layer {layer}: expert {expert} has {most} replicas, more than the table's width of {width}"
        )
    table = np.full((expert_map.num_layers, expert_map.num_logical_experts, width), -1, dtype=np.int32)
    return table, np.zeros(table.shape[:2], dtype=np.int32)
