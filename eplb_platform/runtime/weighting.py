"""Unequal shares for the replicas of an expert: routing tables whose entries repeat.

Every rank makes the same tables from the same load, beside the plan; their digest is compared before
anything moves, and a layer's table changes in the same commit as its map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.balance import as_windows
from eplb_platform.dispatch import even_table, shared_rank_load, table_shares, weighted_table
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime.ports import ExpertLoad

MIN_GAIN = 0.01
"""A layer that keeps its map gets a new table only where that cools its hottest rank by this part."""


@dataclass(frozen=True, eq=False)
class RoutingTables:
    """The tables of all layers, as `eplb_platform.dispatch` makes them."""

    logical_to_physical: NDArray[np.int32]
    """[layers, logical, width], padded with -1."""
    count: NDArray[np.int32]
    """[layers, logical], entries in use."""

    @classmethod
    def even(cls, expert_map: ExpertMap, width: int) -> RoutingTables:
        """Replicas share evenly."""
        return cls(*even_table(expert_map, width))

    @classmethod
    def level(cls, expert_map: ExpertMap, load: ExpertLoad, width: int) -> RoutingTables:
        """Shares that level the ranks on this load [windows, layers, logical]."""
        table = weighted_table(expert_map, load, width)
        return cls(table.logical_to_physical, table.count)

    @property
    def width(self) -> int:
        """Entries of a row."""
        return int(self.logical_to_physical.shape[2])

    def with_layers(self, layers: Sequence[int], other: RoutingTables) -> RoutingTables:
        """These tables, with `layers` taken from `other`."""
        chosen = list(layers)
        table, count = self.logical_to_physical.copy(), self.count.copy()
        table[chosen], count[chosen] = other.logical_to_physical[chosen], other.count[chosen]
        return RoutingTables(table, count)

    def window_rank_load(
        self, expert_map: ExpertMap, load: ExpertLoad
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As `balance.window_rank_load`, with the shares of these tables, made for `expert_map`."""
        shares = table_shares(expert_map, self.logical_to_physical, self.count)
        by_rank = shared_rank_load(expert_map, as_windows(load), shares)[..., expert_map.topology.is_active]
        return by_rank.mean(axis=-1).sum(axis=0), by_rank.max(axis=-1).sum(axis=0)

    def digest(self) -> str:
        """32 hexadecimal digits that depend on the content alone."""
        content = hashlib.blake2b(repr(self.logical_to_physical.shape).encode(), digest_size=16)
        for array in (self.logical_to_physical, self.count):
            content.update(np.ascontiguousarray(array, dtype="<i4").data)
        return content.hexdigest()


def worth_reweighing(
    expert_map: ExpertMap,
    planned: ExpertMap,
    in_force: RoutingTables,
    aim: RoutingTables,
    load: ExpertLoad,
) -> list[int]:
    """The layers whose map stays and whose hottest rank the new table cools.

    in_force: made for `expert_map`; aim: made for `planned`
    """
    stays = (expert_map.physical_to_logical == planned.physical_to_logical).all(axis=1)
    _, hottest = in_force.window_rank_load(expert_map, load)
    _, cooled = aim.window_rank_load(planned, load)
    return [int(layer) for layer in np.flatnonzero(stays & (cooled < hottest * (1 - MIN_GAIN)))]
