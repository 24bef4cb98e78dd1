"""A thousand ranks: one large cluster, so many cycles, and how long that takes.

    python -m eplb_platform.testing.cluster.large --ranks 1024 --layers 58 --cycles 10

The planner makes random maps. All else is as for any seed.
"""

from __future__ import annotations

import argparse
import sys
import time

from eplb_platform.config import EplbConfig
from eplb_platform.testing.cluster.campaign import Tally
from eplb_platform.testing.cluster.scenario import Scenario
from eplb_platform.testing.cluster.simulation import simulate

INTERVAL = 24


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
    result = simulate(large_scenario(options.ranks, options.layers, options.cycles, options.seed))
    tally = Tally(seconds=time.perf_counter() - started)
    tally.add(result)
    print(f"{options.ranks} ranks, {options.layers} layers, {result.events} events")
    print("\n".join(tally.lines()))
    return int(bool(result.violations))


if __name__ == "__main__":
    sys.exit(main())
