"""What measuring the experts' compute time adds to a forward pass, at interval 1.

Every rank serves decode steps of a Qwen3-MoE checkpoint, as the demo does; every other pass is measured, so
that a noisy machine is as noisy for both kinds. `accounted` is what the profiler says of itself, as a part of
all passes' time had all been measured.

    python benchmarks/profiling_overhead.py --ranks 4
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import Store

from eplb_backends.cpu import CpuBackend
from eplb_platform import EplbConfig
from eplb_platform.demo.settings import CHECKPOINT
from eplb_platform.heat import Phase
from eplb_platform.integrations.transformers import load_expert_parallel
from eplb_platform.runtime import start_balancer
from eplb_platform.testing.processes import RankPool

PASSES_OF_A_BATCH = 24


@dataclass(frozen=True)
class RankTimes:
    off_ms: NDArray[np.float64]
    on_ms: NDArray[np.float64]
    accounted_ms: float
    """Of a measured pass."""
    measured: int


@torch.inference_mode()
def measure(
    rank: int, num_ranks: int, store: Store, model_path: str, sequences: int, passes: int
) -> RankTimes:
    """One rank's forward times, the balancer's step included."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("model", store), rank=rank, world_size=num_ranks, timeout=timeout
    )
    backend = CpuBackend()
    model = load_expert_parallel(
        model_path, rank=rank, num_ranks=num_ranks, backend=backend, num_redundant_experts=4 * num_ranks
    )
    config = EplbConfig(
        log_balancedness=True,
        expert_heat_collection_interval=10 * passes,  # no cycle
        enable_expert_compute_profiling=True,
        expert_compute_profiling_warmup_steps=0,
    )
    balancer = start_balancer(config, model, backend, store, rank)
    balancer.stop_profiling()
    times: tuple[list[float], list[float]] = ([], [])
    draw = torch.Generator().manual_seed(rank)
    cache = None
    for number in range(-PASSES_OF_A_BATCH, passes):
        if number % PASSES_OF_A_BATCH == 0:
            cache = None
        inputs = torch.randint(32, 127, (sequences, 12 if cache is None else 1), generator=draw)
        is_prefill, is_measured = cache is None, number % 2 == 1
        started = perf_counter()
        cache = model.module(input_ids=inputs, past_key_values=cache, use_cache=True).past_key_values
        (balancer.stop_profiling if is_measured else balancer.start_profiling)()  # of the next pass
        balancer.step(model.take_load(), phase=Phase.DECODE)
        if number >= 0 and not is_prefill:
            times[is_measured].append((perf_counter() - started) * 1e3)
    profiling = balancer.profiling
    assert profiling is not None
    accounted, measured = profiling.profiler.overhead_ms, profiling.measured_passes
    balancer.close()
    dist.destroy_process_group()
    return RankTimes(np.array(times[0]), np.array(times[1]), accounted / max(measured, 1), measured)


def summarise(ranks: list[RankTimes]) -> dict[str, float]:
    """Medians over the passes of the slowest rank of each."""
    off, on = (np.max([getattr(rank, name) for rank in ranks], axis=0) for name in ("off_ms", "on_ms"))
    # Neighbouring passes see the same noise: their ratio is steadier than the ratio of medians.
    pairs = min(len(off), len(on))
    return {
        "ranks": len(ranks),
        "cores": os.cpu_count() or 0,
        "passes": pairs,
        "off_median_ms": float(np.median(off)),
        "on_median_ms": float(np.median(on)),
        "median_ratio": float(np.median(on) / np.median(off)),
        "paired_median_ratio": float(np.median(on[:pairs] / off[:pairs])),
        "accounted": float(max(rank.accounted_ms for rank in ranks) / np.median(off)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--sequences", type=int, default=256, help="on all ranks together")
    parser.add_argument("--passes", type=int, default=1200)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with RankPool(given.ranks, timeout_s=500.0) as pool:
        ranks = pool.run(measure, str(given.model), given.sequences // given.ranks, given.passes)
    summary = summarise(ranks)
    if given.json:
        print(json.dumps(summary))
        return
    print(f"{given.ranks} ranks on {os.cpu_count()} cores, {summary['passes']:.0f} passes of each kind, ms")
    print(f"not measured {summary['off_median_ms']:8.3f}")
    print(f"measured     {summary['on_median_ms']:8.3f}")
    print(f"added: {100 * (summary['median_ratio'] - 1):.2f} % by medians, "
          f"{100 * (summary['paired_median_ratio'] - 1):.2f} % by the median of neighbours' ratios, "
          f"{100 * summary['accounted']:.2f} % accounted for")  # fmt: skip


if __name__ == "__main__":
    main()
