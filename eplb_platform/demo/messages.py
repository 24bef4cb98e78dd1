"""What goes between the command and the processes of its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_platform.demo.schedule import RankBatch

if TYPE_CHECKING:
    from eplb_platform.runtime.stats import BalancerStats


@dataclass(frozen=True)
class Orders:
    """What a rank is told to do in a phase."""

    rank: int
    num_ranks: int
    store_port: int
    model: Path
    num_logical_experts: int
    redundant_experts: int
    backend: str
    eplb_config: Mapping[str, object] | None
    """As the engine would be given it; None serves without a balancer."""
    batches: tuple[RankBatch, ...]
    log: Path
    repeats: NDArray[np.int64] | None = None
    """[layers, logical], how often each expert does its work; None for once."""


@dataclass(frozen=True)
class Progress:
    """The load [forwards, layers, ranks] that this rank sent since its last report."""

    step: int
    load: NDArray[np.int64]
    moved_experts: int
    cycles: int


@dataclass(frozen=True)
class RankResult:
    """What a rank hands back at the end of a phase."""

    tokens: list[NDArray[np.uint8]]
    load: NDArray[np.int64]
    """[forwards, layers, ranks]: tokens that this rank sent to each rank's experts."""
    forward_ms: NDArray[np.float64]
    stats: BalancerStats | None
    expert_ms: NDArray[np.float64] | None = None
    """[2, layers]: what this rank's experts took before the first commit, and from it on."""


@dataclass(frozen=True)
class Failure:
    """Why a rank stopped, and when by the machine's monotonic clock: the earliest caused the others."""

    message: str
    at: float
