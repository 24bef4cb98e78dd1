"""What the forward threads of all ranks do together at one boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from eplb_platform.migration.schedule import Chunk
from eplb_platform.runtime.weighting import RoutingTables


@dataclass(frozen=True, eq=False)
class Commit:
    """A chunk of moves, and the tables to route by afterwards."""

    chunk: Chunk
    tables: RoutingTables | None = None
    """Of all layers; None where replicas share evenly."""


@dataclass(frozen=True, eq=False)
class EnqueueExchange:
    """The exchange of a prepared chunk, where the forward thread has to enqueue it; nothing is waited for."""

    chunk: Chunk


@dataclass(frozen=True, eq=False)
class OpenExchange:
    """The device's group under a new epoch, which the forward threads of all ranks make together."""

    epoch: int


Action: TypeAlias = Commit | EnqueueExchange | OpenExchange
