"""What measuring the experts' compute time adds to a forward pass, at interval 1.

Every rank serves decode steps of a Qwen3-MoE checkpoint, as the demo does; every other pass is measured, so
that a noisy machine is as noisy for both kinds. Beside the time of a pass stands the processor time of the
thread that runs it, which other processes on the machine change far less.

    python benchmarks/profiling_overhead.py --ranks 4
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter, thread_time

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
    """[passes, time and processor time]"""
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
    times: tuple[list[list[float]], list[list[float]]] = ([], [])
    draw = torch.Generator().manual_seed(rank)
    cache = None
    for number in range(-PASSES_OF_A_BATCH, passes):
        if number % PASSES_OF_A_BATCH == 0:
            cache = None
        inputs = torch.randint(32, 127, (sequences, 12 if cache is None else 1), generator=draw)
        is_prefill, is_measured = cache is None, number % 2 == 1
        started = np.array([perf_counter(), thread_time()])
        cache = model.module(input_ids=inputs, past_key_values=cache, use_cache=True).past_key_values
        (balancer.stop_profiling if is_measured else balancer.start_profiling)()  # of the next pass
        balancer.step(model.take_load(), phase=Phase.DECODE)
        if number >= 0 and not is_prefill:
            times[is_measured].append(((np.array([perf_counter(), thread_time()]) - started) * 1e3).tolist())
    profiling = balancer.profiling
    assert profiling is not None
    accounted, measured = profiling.profiler.overhead_ms, profiling.measured_passes
    balancer.close()
    dist.destroy_process_group()
    return RankTimes(np.array(times[0]), np.array(times[1]), accounted / max(measured, 1), measured)


def summarise(ranks: list[RankTimes]) -> dict[str, float]:
    """Medians over the passes: of the slowest rank's time, and of the mean rank's processor time."""
    off, on = (np.stack([getattr(rank, name) for rank in ranks]) for name in ("off_ms", "on_ms"))
    summary: dict[str, float] = {"ranks": len(ranks), "cores": os.cpu_count() or 0, "passes": off.shape[1]}
    for name, without, measured in (
        ("wall", off[..., 0].max(axis=0), on[..., 0].max(axis=0)),
        ("processor", off[..., 1].mean(axis=0), on[..., 1].mean(axis=0)),
    ):
        summary[f"{name}_off_ms"] = float(np.median(without))
        summary[f"{name}_on_ms"] = float(np.median(measured))
        summary[f"{name}_added"] = summary[f"{name}_on_ms"] / summary[f"{name}_off_ms"] - 1
    summary["accounted"] = max(rank.accounted_ms for rank in ranks) / summary["processor_off_ms"]
    return summary


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
    print(
        f"{given.ranks} ranks on {os.cpu_count()} cores, {summary['passes']:.0f} passes of each kind, medians"
    )
    print("                  not measured    measured     added")
    for name in ("wall", "processor"):
        off, on, added = (summary[f"{name}_{column}"] for column in ("off_ms", "on_ms", "added"))
        print(f"{name:10}{off:17.3f} ms{on:9.3f} ms{100 * added:8.2f} %")
    print(f"the profiler accounts for {100 * summary['accounted']:.2f} % of the processor time")


if __name__ == "__main__":
    main()
