"""Experts that take longer are found, on whichever rank they are, and balanced by time.

The timers read a clock that only the experts' work moves on: what a busy machine's own clock says of work
that takes half a millisecond is chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from eplb_backends.cpu import CpuBackend
from eplb_platform.config import EplbConfig
from eplb_platform.records import compute_cost
from eplb_platform.runtime import BalancerStats, start_balancer
from eplb_platform.testing.processes import RankPool
from tests.processes.common_end import CommonEnd
from tests.processes.test_transformers import EXPERTS, MOE_LAYERS, open_model, write_checkpoint

if TYPE_CHECKING:
    from eplb_platform.integrations.transformers import ExpertParallelModel

pytestmark = pytest.mark.processes

RANKS, PASSES, INTERVAL, WARM_UP = 2, 40, 8, 4
SLOW_MS, QUICK_MS = 0.5, 0.02
"""What a token takes in a matrix product."""
SLOW = range(8)
"""The first rank's experts at the start, most of them."""


class WorkClock:
    """The time of one process, in which nothing but its experts' work takes any."""

    now_ms = 0.0


class WorkTimer:
    def __init__(self, clock: WorkClock) -> None:
        self._clock = clock
        self._started_ms: float | None = None
        self._stopped_ms: float | None = None

    def start(self) -> None:
        self._started_ms, self._stopped_ms = self._clock.now_ms, None

    def stop(self) -> None:
        self._stopped_ms = self._clock.now_ms

    def elapsed_ms(self) -> float | None:
        if self._started_ms is None or self._stopped_ms is None:
            return None
        return self._stopped_ms - self._started_ms


class WorkTimingBackend(CpuBackend):
    def __init__(self, clock: WorkClock) -> None:
        super().__init__()
        self._clock = clock

    def timer(self) -> WorkTimer:
        return WorkTimer(self._clock)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(RANKS, timeout_s=400) as pool:
        yield pool


@dataclass
class Measured:
    stats: BalancerStats
    summary: dict[str, object]
    cost: NDArray[np.float64]
    slots: NDArray[np.int32]
    """[layers, ranks, slots] at the end."""
    tokens: NDArray[np.int64]


def slow_down(model: ExpertParallelModel, rank: int, clock: WorkClock) -> None:
    """Some experts take long for each matrix product, wherever they are."""
    for layer, block in enumerate(model._blocks):

        def multiply(
            slot: int, rows: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, layer: int = layer
        ) -> None:
            is_slow = model.expert_map.by_rank()[layer, rank, slot] in SLOW
            clock.now_ms += len(rows) * (SLOW_MS if is_slow else QUICK_MS)
            torch.mm(rows, weight.t(), out=output)

        block.multiply = multiply  # type: ignore[method-assign]


def serve(rank: int, num_ranks: int, store: dist.Store, folder: Path, values: dict[str, object]) -> Measured:
    model = open_model(rank, num_ranks, store, folder, None, 0)
    clock = WorkClock()
    slow_down(model, rank, clock)
    config = EplbConfig(
        dynamic_eplb=True, expert_heat_collection_interval=INTERVAL, algorithm_execution_interval=0,
        layer_updates_per_step=len(MOE_LAYERS), commit_margin_steps=1, **values,
    )  # fmt: skip
    balancer = start_balancer(config, model, WorkTimingBackend(clock), store, rank)
    draw, tokens = torch.Generator().manual_seed(rank), []
    with torch.inference_mode():
        end, measured = CommonEnd(store, rank, range(num_ranks)), 0
        for number in itertools.count():
            # Two cycles after all was measured: the second one looks at what the first one moved.
            measured = balancer.stats.cycles if number == PASSES // 2 else measured
            if end.has_come(number, number + 2 >= PASSES and balancer.stats.cycles >= measured + 3):
                break
            ids = torch.randint(0, 256, (2, 24), generator=draw)
            tokens.append(model.module(input_ids=ids).logits[:, -1].argmax(-1))
            if number == PASSES // 2 and balancer.profiling is not None:
                balancer.stop_profiling()
            balancer.step(model.take_load())
    balancer.drain()
    summary = balancer.compute_statistics() if balancer.profiling is not None else {}
    cost = np.zeros(0) if balancer.profiling is None else balancer.profiling.cost
    balancer.close()
    return Measured(
        balancer.stats, summary, cost, balancer.expert_map.by_rank(), torch.stack(tokens).numpy().copy()
    )


def test_slow_experts_are_found_and_spread(ranks: RankPool, tmp_path: Path) -> None:
    folder, path = write_checkpoint(tmp_path / "model"), tmp_path / "cost.npy"
    by_tokens = ranks.run(serve, folder, {})
    by_time = ranks.run(serve, folder, {
        "enable_expert_compute_profiling": True, "compute_cost_alpha": 1.0,
        "expert_compute_profiling_warmup_steps": WARM_UP, "compute_cost_record_path": str(path),
    })  # fmt: skip
    for without, measured in zip(by_tokens, by_time, strict=True):
        passes = min(len(without.tokens), len(measured.tokens))
        np.testing.assert_array_equal(without.tokens[:passes], measured.tokens[:passes])
        assert without.stats.time_balancedness is None and without.stats.profiled_passes == 0
        # From the end of the warm-up to the stop.
        assert measured.stats.profiled_passes == PASSES // 2 + 1 - WARM_UP
        assert measured.stats.profiling_s > 0 and measured.stats.expert_compute_s > 0
        assert measured.summary["profiling_enabled"] is False
        np.testing.assert_array_equal(measured.cost, by_time[0].cost)
        np.testing.assert_array_equal(measured.slots, by_time[0].slots)
    cost, slow = by_time[0].cost, np.isin(np.arange(EXPERTS), SLOW)
    assert np.nanmin(cost[:, slow]) > np.nanmax(cost[:, ~slow])
    np.testing.assert_array_equal(compute_cost.read(path), cost)
    assert isinstance(by_time[0].summary["layers"], dict)
    assert by_time[0].summary["layers"]["layer_0"]["expert_0"]["num_invocations"] > 0
    # By tokens they stay where they are or go anywhere; by time each rank gets its part.
    shared = np.isin(by_time[0].slots, SLOW).sum(axis=2)
    assert (shared >= 2).all(), shared
    stats = by_time[0].stats
    assert stats.failed_cycles == 0 and stats.moved_cycles > 0
    assert stats.time_balancedness is not None and stats.time_balancedness > 0.7
