"""What all ranks do together at one boundary."""

from __future__ import annotations

from dataclasses import dataclass

from eplb_platform.migration.schedule import Chunk
from eplb_platform.runtime.weighting import RoutingTables


@dataclass(frozen=True, eq=False)
class Commit:
    """A chunk of moves, and the tables to route by afterwards."""

    chunk: Chunk
    tables: RoutingTables | None = None
    """Of all layers; None where replicas share evenly."""
