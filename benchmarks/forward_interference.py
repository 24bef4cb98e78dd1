"""How much balancing slows the forward passes that run beside it.

Every rank serves decode steps of a Qwen3-MoE checkpoint while the balancer, in turn, rests and works as hard
as it
can: each cycle plans a DeepSeek-R1-sized load and then moves every expert of the model to another place.
Blocks of both alternate in one run, so that a noisy machine is noisy for both. On a machine with fewer free
cores than ranks the background work also takes processor time from the forward passes; the table says how
many cores there are.

    python benchmarks/forward_interference.py --ranks 2
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
from eplb_platform import EplbConfig, ExpertMap, Topology, rebalance_experts
from eplb_platform.demo.settings import CHECKPOINT
from eplb_platform.heat import Phase
from eplb_platform.integrations.transformers import ExpertParallelModel, load_expert_parallel
from eplb_platform.runtime import Balancer, start_balancer
from eplb_platform.runtime.ports import ExpertLoad
from eplb_platform.testing.processes import RankPool

PLANNED_LAYERS, PLANNED_EXPERTS, PLANNED_SLOTS, PLANNED_RANKS, PLANNED_WINDOWS = 58, 256, 288, 32, 16


@dataclass(frozen=True)
class Options:
    model: str
    sequences: int
    block_steps: int
    blocks: int
    seed: int


class RestlessPlanner:
    """Plans a large load as a real planner would, and then asks for every expert to move."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._load = self._draw.lognormal(size=(PLANNED_WINDOWS, PLANNED_LAYERS, PLANNED_EXPERTS))

    async def plan(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        topology = Topology(PLANNED_RANKS)
        rebalance_experts(self._load, num_physical_experts=PLANNED_SLOTS, topology=topology)
        turned = np.roll(current.physical_to_logical, current.slots_per_rank, axis=1)
        return ExpertMap(turned, current.num_logical_experts, current.topology)


@dataclass(frozen=True)
class RankTimes:
    rest_ms: NDArray[np.float64]
    work_ms: NDArray[np.float64]
    stall_ms: float
    wait_ms: float
    cycles: int
    moved_experts: int
    megabytes: float


@torch.inference_mode()
def measure(rank: int, num_ranks: int, store: Store, options: Options) -> RankTimes:
    """One rank's forward times, the balancer's step included."""
    join_group(rank, num_ranks, store)
    backend = CpuBackend()
    model = load_expert_parallel(options.model, rank=rank, num_ranks=num_ranks, backend=backend)
    config = EplbConfig(dynamic_eplb=True, expert_heat_collection_interval=1, algorithm_execution_interval=0)
    balancer = start_balancer(config, model, backend, store, rank, planner=RestlessPlanner(options.seed))
    times: dict[bool, list[float]] = {False: [], True: []}
    for block in range(2 * options.blocks):
        works = block % 2 == 1
        balancer.resume() if works else balancer.pause()
        times[works] += _serve_block(model, balancer, options, block)
    balancer.close()
    dist.destroy_process_group()
    stats = balancer.stats
    return RankTimes(
        np.array(times[False]),
        np.array(times[True]),
        stats.longest_stall_s * 1e3,
        stats.longest_wait_s * 1e3,
        stats.cycles,
        stats.moved_experts,
        stats.bytes_received / 1e6,
    )


def join_group(rank: int, num_ranks: int, store: Store) -> None:
    """The model's own process group."""
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("model", store),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )


def _serve_block(model: ExpertParallelModel, balancer: Balancer, options: Options, block: int) -> list[float]:
    """Milliseconds of each decode step of one block; its prompts and its cache are new."""
    draw = torch.Generator().manual_seed(options.seed + block)

    def text(length: int) -> torch.Tensor:
        return torch.randint(32, 127, (options.sequences, length), generator=draw)

    cache = model.module(input_ids=text(8), use_cache=True).past_key_values
    times = []
    for _ in range(options.block_steps):
        inputs = text(1)
        started = perf_counter()
        model.module(input_ids=inputs, past_key_values=cache, use_cache=True)
        balancer.step(model.take_load(), phase=Phase.DECODE)
        times.append((perf_counter() - started) * 1e3)
    return times


def summarise(ranks: list[RankTimes]) -> dict[str, float]:
    """Percentiles over the ranks' steps, after the first steps of each kind, which set things up."""
    rest = np.concatenate([rank.rest_ms for rank in ranks])
    work = np.concatenate([rank.work_ms for rank in ranks])
    summary: dict[str, float] = {"cores": os.cpu_count() or 0, "ranks": len(ranks)}
    for name, times in (("rest", rest), ("work", work)):
        for percentile in (50, 90, 99):
            summary[f"{name}_p{percentile}_ms"] = float(np.percentile(times, percentile))
        summary[f"{name}_max_ms"] = float(times.max())
    summary["p50_ratio"] = summary["work_p50_ms"] / summary["rest_p50_ms"]
    summary["p99_ratio"] = summary["work_p99_ms"] / summary["rest_p99_ms"]
    summary["longest_stall_ms"] = max(rank.stall_ms for rank in ranks)
    summary["longest_wait_ms"] = max(rank.wait_ms for rank in ranks)
    summary["cycles"] = ranks[0].cycles
    summary["moved_experts"] = ranks[0].moved_experts
    summary["megabytes_received"] = sum(rank.megabytes for rank in ranks)
    return summary


def print_table(summary: dict[str, float]) -> None:
    print(f"{summary['ranks']:.0f} ranks on {summary['cores']:.0f} cores, forward passes in ms")
    print(f"{'':24}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}")
    for name, label in (("rest", "balancer at rest"), ("work", "planning and moving")):
        cells = [summary[f"{name}_{column}_ms"] for column in ("p50", "p90", "p99", "max")]
        print(f"{label:24}" + "".join(f"{cell:8.2f}" for cell in cells))
    print(f"ratio: p50 {summary['p50_ratio']:.2f}, p99 {summary['p99_ratio']:.2f}")
    print(
        f"longest stall {summary['longest_stall_ms']:.2f} ms, longest wait for a decision "
        f"{summary['longest_wait_ms']:.2f} ms; {summary['cycles']:.0f} cycles moved "
        f"{summary['moved_experts']:.0f} experts, {summary['megabytes_received']:.1f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--block-steps", type=int, default=150)
    parser.add_argument("--blocks", type=int, default=6, help="blocks of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = Options(
        str(arguments.model),
        arguments.sequences,
        arguments.block_steps,
        arguments.blocks,
        arguments.seed,
    )
    with RankPool(arguments.ranks, timeout_s=500.0) as ranks:
        summary = summarise(ranks.run(measure, options))
    if arguments.json:
        print(json.dumps(summary))
    else:
        print_table(summary)


if __name__ == "__main__":
    main()
