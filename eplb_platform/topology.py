"""Topology: the ranks of an expert-parallel group and the nodes that they stand on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import index

import numpy as np
from numpy.typing import NDArray

from eplb_platform.limits import MOST_RANKS


@dataclass(frozen=True, init=False)
class Topology:
    """Ranks, the nodes that they stand on, and which ranks are active.

    num_ranks: ranks of the expert-parallel group, inactive ones included
    num_nodes: nodes, each holding a run of neighbouring ranks; num_ranks need not be a multiple of it
    active_ranks: the ranks that take tokens, ascending; given in any order, None means all

    Raises ValueError for a count below 1, more ranks than `MOST_RANKS`, more nodes than ranks, no active
    rank, and an active rank that is unknown or given twice.
    """

    num_ranks: int
    num_nodes: int
    active_ranks: tuple[int, ...]

    def __init__(self, num_ranks: int, num_nodes: int = 1, active_ranks: Iterable[int] | None = None) -> None:
        ranks, nodes = _count("num_ranks", num_ranks), _count("num_nodes", num_nodes)
        if ranks > MOST_RANKS:
            raise ValueError(f"num_ranks is {ranks}, expected at most {MOST_RANKS}")
        if nodes > ranks:
            raise ValueError(f"num_nodes is {nodes}, expected at most num_ranks ({ranks}): a node has a rank")
        active = range(ranks) if active_ranks is None else active_ranks
        # The class is frozen: this is its one moment of change.
        object.__setattr__(self, "num_ranks", ranks)
        object.__setattr__(self, "num_nodes", nodes)
        object.__setattr__(self, "active_ranks", _sorted_ranks(active, ranks))

    @cached_property
    def node_of_rank(self) -> NDArray[np.int32]:
        """[ranks], the node of each rank; read-only."""
        nodes = (np.arange(self.num_ranks) * self.num_nodes // self.num_ranks).astype(np.int32)
        nodes.flags.writeable = False
        return nodes

    @cached_property
    def is_active(self) -> NDArray[np.bool_]:
        """[ranks], whether the rank takes tokens; read-only."""
        active = np.zeros(self.num_ranks, dtype=np.bool_)
        active[list(self.active_ranks)] = True
        active.flags.writeable = False
        return active

    @property
    def num_active_ranks(self) -> int:
        return len(self.active_ranks)

    def __reduce__(self) -> tuple[type[Topology], tuple[int, int, tuple[int, ...]]]:
        # Rebuilt, not copied: an array that went through pickle is writable again.
        return Topology, (self.num_ranks, self.num_nodes, self.active_ranks)


def _count(name: str, value: int) -> int:
    """`value` as a Python int of at least 1."""
    count = _integer(name, value)
    if count < 1:
        raise ValueError(f"{name} is {count}, expected at least 1")
    return count


def _integer(name: str, value: int) -> int:
    # index() takes NumPy's integers and refuses floats, but it would take True for 1.
    if isinstance(value, bool):
        raise ValueError(f"{name} is {value}, expected an integer")
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None


def _sorted_ranks(ranks: Iterable[int], num_ranks: int) -> tuple[int, ...]:
    """`ranks` in ascending order, checked: at least one, all known, none twice."""
    active = sorted(_integer("an active rank", rank) for rank in ranks)
    if not active:
        raise ValueError("active_ranks is empty, expected at least one rank")
    for rank in (active[0], active[-1]):
        if not 0 <= rank < num_ranks:
            raise ValueError(f"active rank {rank} is out of range, expected 0 to {num_ranks - 1}")
    for rank, following in pairwise(active):
        if rank == following:
            raise ValueError(f"active rank {rank} is given twice")
    return tuple(active)
