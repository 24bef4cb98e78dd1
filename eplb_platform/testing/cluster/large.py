"""A thousand ranks: one large cluster, so many cycles, and how long that takes.

    python -m eplb_platform.testing.cluster.large --ranks 1024 --layers 58 --cycles 10

In one process, what every rank would compute from the same arguments is computed once and shared: schedules,
maps made of a broadcast plan, counts of moved experts. The planner makes random maps. All else is as for any
seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from eplb_platform.balance import moved_experts
from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Schedule, build_schedule
from eplb_platform.runtime import cycle
from eplb_platform.testing.cluster.campaign import Tally
from eplb_platform.testing.cluster.scenario import Scenario
from eplb_platform.testing.cluster.simulation import simulate

Key = TypeVar("Key")
Value = TypeVar("Value")

INTERVAL = 24
KEPT = 256


@contextmanager
def computed_once() -> Iterator[None]:
    """What a cycle computes from equal arguments is computed once for all ranks."""
    receive = cycle.Cycle._broadcast
    maps: dict[bytes, ExpertMap] = {}
    schedules: dict[tuple[str, str], Schedule] = {}
    counts: dict[tuple[int, int], tuple[ExpertMap, ExpertMap, NDArray[np.int64]]] = {}

    async def one_map(of: cycle.Cycle, planned: ExpertMap) -> ExpertMap:
        received = await receive(of, planned)
        return _remember(maps, received.physical_to_logical.tobytes(), lambda: received)

    def one_schedule(old: ExpertMap, new: ExpertMap, **rules: int) -> Schedule:
        return _remember(schedules, (old.digest(), new.digest()), lambda: _build(old, new, rules))

    def one_count(old: ExpertMap, new: ExpertMap) -> NDArray[np.int64]:
        key = id(old), id(new)
        return _remember(counts, key, lambda: (old, new, moved_experts(old, new)))[2]

    with (
        patch.object(cycle, "build_schedule", one_schedule),
        patch.object(cycle, "moved_experts", one_count),
        patch.object(cycle.Cycle, "_broadcast", one_map),
    ):
        yield


def _build(old: ExpertMap, new: ExpertMap, rules: dict[str, int]) -> Schedule:
    return build_schedule(
        old, new, layers_per_chunk=rules["layers_per_chunk"], staging_slots=rules["staging_slots"]
    )


def _remember(kept: dict[Key, Value], key: Key, compute: Callable[[], Value]) -> Value:
    if key not in kept:
        if len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = compute()
    return kept[key]


def large_scenario(num_ranks: int, num_layers: int, num_cycles: int, seed: int) -> Scenario:
    """A healthy cluster that serves for so many collections."""
    return Scenario(
        seed=seed,
        num_ranks=num_ranks,
        num_layers=num_layers,
        slots_per_rank=1,
        num_redundant=num_ranks // 2,
        num_nodes=max(1, num_ranks // 8),
        config=EplbConfig(
            dynamic_eplb=True,
            expert_heat_collection_interval=INTERVAL,
            algorithm_execution_interval=0,
            load_windows=1,
            layer_updates_per_step=max(1, num_layers // 2),
            transfer_timeout_s=20.0,
        ),
        quiet_step=2 * num_cycles * INTERVAL,  # a cycle takes longer than its collection here
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when a rule was broken."""
    parser = argparse.ArgumentParser(prog="python -m eplb_platform.testing.cluster.large")
    for name, default in (("ranks", 1024), ("layers", 58), ("cycles", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    if min(options.ranks - 1, options.layers, options.cycles) < 1:
        parser.error("expected at least 2 ranks, 1 layer and 1 cycle")
    started = time.perf_counter()
    with computed_once():
        result = simulate(large_scenario(options.ranks, options.layers, options.cycles, options.seed))
    tally = Tally(seconds=time.perf_counter() - started)
    tally.add(result)
    print(f"{options.ranks} ranks, {options.layers} layers, {result.events} events")
    print("\n".join(tally.lines()))
    return int(bool(result.violations))


if __name__ == "__main__":
    sys.exit(main())
