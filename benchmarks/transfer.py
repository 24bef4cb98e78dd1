"""How near a migration comes to the bandwidth of the bare collective.

Processes on this machine move experts from one plan's map to another's and back through the CPU backend:
`fetch` and `swap` of every chunk. In between, in the same run, `torch.distributed.batch_isend_irecv` over
gloo moves the same tensors between the same pairs, all of a layer at once, into the same slots of a second
set of weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import P2POp, Store

from eplb_backends.cpu import CpuBackend
from eplb_platform.algorithms import rebalance_experts
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Schedule, build_schedule
from eplb_platform.migration.staging import Staging
from eplb_platform.migration.transfer import Migrator
from eplb_platform.testing.processes import run_ranks
from eplb_platform.topology import Topology

Result = TypeVar("Result")
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Settings:
    """What is moved. expert_mb: 10^6 bytes, in two parameters of two thirds and one third."""

    ranks: int
    layers: int
    slots: int
    redundant: int
    expert_mb: float
    layers_per_chunk: int
    staging_mb: float | None
    repeats: int
    seed: int
    verify: bool


@dataclass(frozen=True)
class Timing:
    """One rank's seconds: fetch and swap apart, all chunks, and the bare collective."""

    fetch_s: float
    swap_s: float
    migration_s: float
    migration_cpu_s: float
    bare_s: float
    bare_cpu_s: float


def two_maps(settings: Settings) -> tuple[ExpertMap, ExpertMap]:
    """Plans for two unrelated loads."""
    rng = np.random.default_rng(settings.seed)
    slots = settings.ranks * settings.slots
    loads = rng.lognormal(size=(2, settings.layers, slots - settings.redundant))
    topology = Topology(settings.ranks)
    old = rebalance_experts(
        loads[0], num_physical_experts=slots, topology=topology, algorithm="deepseek"
    ).expert_map
    return old, rebalance_experts(loads[1], topology=topology, current=old, algorithm="deepseek").expert_map


def fill(weights: list[list[torch.Tensor]], expert_map: ExpertMap, rank: int) -> None:
    """Every value of an expert is its number, so that a wrong slot can be seen."""
    for layer, parameters in enumerate(weights):
        for slot, expert in enumerate(expert_map.by_rank()[layer, rank].tolist()):
            for parameter in parameters:
                parameter[slot].fill_(layer * 1000 + expert)


def check(weights: list[list[torch.Tensor]], expert_map: ExpertMap, rank: int) -> None:
    for layer, parameters in enumerate(weights):
        expected = torch.from_numpy(expert_map.by_rank()[layer, rank] + layer * 1000).float()
        for parameter in parameters:
            if not bool((parameter == expected[:, None]).all()):
                raise RuntimeError(f"rank {rank}, layer {layer}: the weights do not follow the map")


def bare_batches(
    schedule: Schedule, weights: list[list[torch.Tensor]], landing: list[list[torch.Tensor]], rank: int
) -> list[list[P2POp]]:
    """The operations of each layer, built ahead: only their execution is timed."""
    batches: list[list[P2POp]] = []
    for chunk in schedule.chunks:
        sends, receives = chunk.sends_of(rank), chunk.receives_of(rank)
        by_layer: dict[int, list[P2POp]] = {layer: [] for layer in chunk.layers}
        for layer, slot, peer in zip(sends.layer, sends.slot, sends.peer, strict=True):
            by_layer[int(layer)] += [P2POp(dist.isend, p[slot], int(peer)) for p in weights[layer]]
        for layer, slot, peer in zip(receives.layer, receives.slot, receives.peer, strict=True):
            if peer != rank:
                by_layer[int(layer)] += [P2POp(dist.irecv, room[slot], int(peer)) for room in landing[layer]]
        batches += by_layer.values()
    return batches


def run_bare(batches: list[list[P2POp]]) -> None:
    for operations in batches:
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


def run_migration(schedule: Schedule, migrator: Migrator) -> tuple[float, float]:
    """Seconds in fetch and in swap."""
    fetch_s = swap_s = 0.0
    for chunk in schedule.chunks:
        started = time.perf_counter()
        migrator.fetch(chunk)
        fetched = time.perf_counter()
        migrator.swap(chunk)
        fetch_s += fetched - started
        swap_s += time.perf_counter() - fetched
    return fetch_s, swap_s


def measure(rank: int, num_ranks: int, store: Store, settings: Settings) -> list[Timing]:
    """One rank: migrate there and back, with the bare collective by turns before or after."""
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )
    backend = CpuBackend()
    backend.connect(store, rank, num_ranks, timeout_s=TIMEOUT_S)
    values = int(settings.expert_mb * 1e6 / 4)
    sizes = [values - values // 3, values // 3]
    weights = [[torch.empty(settings.slots, size) for size in sizes] for _ in range(settings.layers)]
    landing = [[torch.zeros_like(parameter) for parameter in parameters] for parameters in weights]
    maps = two_maps(settings)
    fill(weights, maps[0], rank)
    max_bytes = None if settings.staging_mb is None else int(settings.staging_mb * 1e6)
    staging = Staging(backend, weights, max_bytes=max_bytes, layers_per_chunk=settings.layers_per_chunk)
    migrator = Migrator(backend, weights, staging, rank, verify=settings.verify)
    schedules = [schedule_for(settings, *pair, staging) for pair in (maps, maps[::-1])]
    batches = [bare_batches(schedule, weights, landing, rank) for schedule in schedules]
    timings = []
    for repeat in range(settings.repeats + 1):
        there = repeat % 2
        bare = partial(run_bare, batches[there])
        before = timed(bare) if repeat % 4 < 2 else None
        (fetch_s, swap_s), *migration = timed(partial(run_migration, schedules[there], migrator))
        _, *alone = before or timed(bare)
        timings.append(Timing(fetch_s, swap_s, *migration, *alone))
        check(weights, maps[1 - there], rank)
    backend.close()
    dist.destroy_process_group()
    return timings[1:]  # the first one warms up


def timed(action: Callable[[], Result]) -> tuple[Result, float, float]:
    """The result, the seconds until every rank is done, and the processor seconds that this rank took."""
    dist.barrier()
    started, busy = time.perf_counter(), time.process_time()
    result = action()
    dist.barrier()
    return result, time.perf_counter() - started, time.process_time() - busy


def schedule_for(settings: Settings, old: ExpertMap, new: ExpertMap, staging: Staging) -> Schedule:
    schedule = build_schedule(
        old, new, layers_per_chunk=settings.layers_per_chunk, staging_slots=staging.slots
    )
    if schedule.skipped_layers:
        raise SystemExit(f"--staging-mb is too small for layers {schedule.skipped_layers}: give more")
    return schedule


def report(settings: Settings, timings: list[list[Timing]]) -> dict[str, object]:
    """Medians over the repeats of the slowest rank's seconds, and bandwidth over all ranks."""
    old, new = two_maps(settings)
    schedule = build_schedule(old, new, layers_per_chunk=settings.layers, staging_slots=10**6)
    remote = sum(int(chunk.sends_by_rank().sum()) for chunk in schedule.chunks)
    median = {
        name: statistics.median(
            max(getattr(t, name) for t in repeat) for repeat in zip(*timings, strict=True)
        )
        for name in Timing.__dataclass_fields__
    }
    ratios = [
        max(t.bare_s for t in repeat) / max(t.migration_s for t in repeat)
        for repeat in zip(*timings, strict=True)
    ]
    gigabytes = remote * settings.expert_mb / 1e3
    return {
        "settings": asdict(settings),
        "experts_moved": schedule.num_moves,
        "experts_received": remote,
        "gigabytes_received": gigabytes,
        **{name: round(value, 4) for name, value in median.items()},
        "migration_gb_per_s": round(gigabytes / median["migration_s"], 3),
        "bare_gb_per_s": round(gigabytes / median["bare_s"], 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def parse() -> tuple[Settings, bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8, help="slots per rank")
    parser.add_argument("--redundant", type=int, default=4)
    parser.add_argument("--expert-mb", type=float, default=2.0)
    parser.add_argument("--layers-per-chunk", type=int, default=4)
    parser.add_argument("--staging-mb", type=float, help="by default what one chunk needs")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verify", action="store_true", help="compare checksums")
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    return Settings(**options), as_json


def main() -> None:
    settings, as_json = parse()
    result = report(settings, run_ranks(measure, settings.ranks, settings, timeout_s=TIMEOUT_S))
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{settings.ranks} processes, {settings.layers} layers of {settings.slots} slots per rank, "
        f"{settings.expert_mb:g} MB per expert, {settings.layers_per_chunk} layers per chunk\n"
        f"{result['experts_received']} of {result['experts_moved']} moved experts come from another rank: "
        f"{result['gigabytes_received']:.2f} GB\n"
        f"migration            {result['migration_s']:.3f} s  {result['migration_gb_per_s']:.2f} GB/s  "
        f"(fetch {result['fetch_s']:.3f} s, swap {result['swap_s']:.3f} s)\n"
        f"batch_isend_irecv    {result['bare_s']:.3f} s  {result['bare_gb_per_s']:.2f} GB/s\n"
        f"ratio                {result['ratio']:.2f}   of {settings.repeats} alternating repeats: "
        f"{result['ratios']}"
    )


if __name__ == "__main__":
    main()
