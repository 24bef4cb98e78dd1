"""Measure planning: balance on load seen and not seen, moved experts and time, beside DeepSeek's algorithm.

    python benchmarks/planning.py [--traces FOLDER] [--only NAME]

Everything is seeded. Times are medians of processor time in one thread, of the whole plan: input checked,
map built, bounds proven. "moved" is the share of all slots whose rank must receive the expert.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms import Plan, load_algorithm, rebalance_experts
from eplb_platform.algorithms.discovery import OptionValue
from eplb_platform.balance import balancedness, moved_experts, rank_load, window_balancedness
from eplb_platform.expert_map import ExpertMap
from eplb_platform.offline.synthetic_load import SYNTHETIC_LOADS, LoadShape
from eplb_platform.topology import Topology

Load = NDArray[np.float64]

LAYERS, EXPERTS, SLOTS, RANKS = 58, 256, 288, 32
RECORDED = {
    "decode -> decode": ("decode_in1000out1000", "decode_in1800out100"),
    "prefill -> decode": ("prefill_in1000out1000", "decode_in1000out1000"),
    "prefill 1k -> 2k": ("prefill_in1024", "prefill_in2048"),
    "prefill 1k -> 2k, out 100": ("prefill_in1000out1000", "prefill_in2000out100"),
}


def median_ms(plan: Callable[[], Plan], repeats: int = 7) -> float:
    spent = []
    for _ in range(repeats):
        started = time.process_time()
        plan()
        spent.append(time.process_time() - started)
    return statistics.median(spent) * 1e3


def seeded_loads() -> dict[str, Load]:
    shape = LoadShape(LAYERS, EXPERTS, num_collections=1)
    return {name: SYNTHETIC_LOADS[name](shape, 0)[0][0] for name in ("zipf", "lognormal")}


def options_of(algorithm: str, **options: OptionValue) -> dict[str, Any]:
    return {"num_threads": 1, **options} if algorithm != "deepseek" else {}


def report_cold(hierarchical: bool) -> None:
    for name, load in seeded_loads().items():
        for algorithm in ("deepseek", "adaptive"):
            plan = partial(
                rebalance_experts,
                load,
                num_physical_experts=SLOTS,
                topology=Topology(RANKS, 4 if hierarchical else 1),
                num_expert_groups=8 if hierarchical else 1,
                algorithm=algorithm,
                **options_of(algorithm),
            )
            made = plan()
            found = made.balancedness
            print(
                f"  {name:10} {algorithm:9} {found.mean():.5f}, worst layer {found.min():.5f}, "
                f"{(1 / (found * made.lower_bound)).mean() - 1:.4%} above the bound, "
                f"{median_ms(plan):6.1f} ms"
            )


def recorded_cases(folder: Path) -> Iterator[tuple[str, Load, Load]]:
    from safetensors.numpy import load_file

    loads = {
        path.stem.removeprefix("deepseek_r1_"): load_file(path)["expert_load"].sum(axis=0, dtype=np.float64)
        for path in sorted(folder.glob("*.safetensors"))
    }
    for name, (past, future) in RECORDED.items():
        yield name, loads[past], loads[future]
    first, second = (
        load / load.sum(axis=1, keepdims=True) * 1e8
        for load in (loads[name] for name in RECORDED["decode -> decode"])
    )
    for share in (0.64, 0.7):
        mixed = share * first + (1 - share) * second, share * second + (1 - share) * first
        yield f"decode {share:.0%}:{1 - share:.0%} -> {1 - share:.0%}:{share:.0%}", *mixed


def report_recorded(folder: Path) -> None:
    for name, past, future in recorded_cases(folder):
        current = rebalance_experts(
            past, num_physical_experts=SLOTS, topology=Topology(RANKS), algorithm="adaptive"
        ).expert_map
        before = window_balancedness(current, future).mean()
        for algorithm, price in (("deepseek", 0.0), *(("adaptive", price) for price in (0.25, 0.2, 0.15))):
            plan = partial(
                rebalance_experts,
                future,
                topology=Topology(RANKS),
                current=current,
                algorithm=algorithm,
                **options_of(algorithm, move_price=price),
            )
            made = plan()
            print(
                f"  {name:26} {before:.3f} -> {algorithm:8} {price or '':4} {made.balancedness.mean():.4f}, "
                f"moved {made.moved_experts.sum() / LAYERS / SLOTS:6.2%}, {median_ms(plan, 5):6.1f} ms"
            )


def per_forward(expert_map: ExpertMap, load: Load) -> float:
    return float(balancedness(rank_load(expert_map, load)).mean())


def moved_share(old: ExpertMap, placed: ExpertMap) -> float:
    return float(moved_experts(old, placed).mean() / placed.num_physical_experts)


def drift(kind: str, ranks: int, redundant: int, algorithm: str, **options: Any) -> tuple[float, float]:
    """Balancedness per forward on the next 40, planned on the last 40, and the share moved in a cycle.

    DeepSeek's placement is made anew each time, as an engine's default policy does.
    """
    balance, moved = [], []
    shape = LoadShape(num_layers=4, num_experts=64)
    for seed in range(10, 16):
        collections = SYNTHETIC_LOADS[kind](shape, seed)
        current = ExpertMap.initial(shape.num_layers, shape.num_experts, Topology(ranks), redundant)
        for index, (seen, unseen) in enumerate(pairwise(collections)):
            made = rebalance_experts(
                seen,
                num_physical_experts=current.num_physical_experts,
                topology=current.topology,
                current=None if algorithm == "deepseek" else current,
                algorithm=algorithm,
                **options,
            ).expert_map
            moved.append(moved_share(current, made))
            current = made
            if index:
                balance.append(per_forward(current, unseen))
    return statistics.mean(balance), statistics.mean(moved)


def report_drift() -> None:
    for ranks, redundant in ((8, 0), (8, 8), (8, 16), (16, 0), (16, 16)):
        for kind in ("drifting", "switching"):
            peer, peer_moved = drift(kind, ranks, redundant, "deepseek")
            print(
                f"  {ranks} ranks, {redundant} redundant, {kind}: deepseek {peer:.3f}, moved {peer_moved:.0%}"
            )
            for algorithm in ("adaptive", "flashlb", "swift_balancer"):
                ours, moved = drift(kind, ranks, redundant, algorithm, **options_of(algorithm))
                print(
                    f"    {algorithm:14} {ours:.3f}, closes {(ours - peer) / (1 - peer):.0%} "
                    f"of the distance to 1 with {moved / peer_moved:.2f} of the moves",
                    flush=True,
                )


def report_large() -> None:
    load = np.random.default_rng(1).lognormal(size=(61, 512)) * 1e4
    plan = partial(
        rebalance_experts,
        num_physical_experts=2048,
        topology=Topology(512, 64),
        algorithm="adaptive",
        num_threads=1,
    )
    for layers in (30, 61):
        cold = partial(plan, load[:layers])
        print(f"  {layers} layers, cold: {cold().balancedness.mean():.4f}, {median_ms(cold, 3):.0f} ms")
    current = cold().expert_map
    drifted = load * np.random.default_rng(2).lognormal(sigma=0.25, size=load.shape)
    again = partial(plan, drifted, current=current)
    made = again()
    print(
        f"  repair after drift: {window_balancedness(current, drifted).mean():.4f} -> "
        f"{made.balancedness.mean():.4f}, moved {made.moved_experts.sum() / 61 / 2048:.2%}, "
        f"{median_ms(again, 1):.0f} ms"
    )


def report_golden() -> None:
    load = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
    plan = rebalance_experts(load, num_physical_experts=16, topology=Topology(8), algorithm="adaptive")
    print(f"  hottest rank {load.sum() / 8 / plan.balancedness[0]:.2f}, possible with even shares: 196.67")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, help="folder of recorded loads, 58 layers of 256 experts")
    parser.add_argument("--only", help="part of the name of one report")
    arguments = parser.parse_args()
    started = time.perf_counter()
    load_algorithm("adaptive")().warm_up()
    first = time.perf_counter() - started
    reports: dict[str, Callable[[], None]] = {
        "cold, global": lambda: report_cold(hierarchical=False),
        "cold, hierarchical": lambda: report_cold(hierarchical=True),
        "golden case": report_golden,
        "61 x 512 on 2048 slots, 512 ranks, 64 nodes": report_large,
        "drifting, next 40 forwards": report_drift,
    }
    if arguments.traces:
        reports["recorded"] = lambda: report_recorded(arguments.traces)
    print(f"warm-up {first:.2f} s")
    for name, report in reports.items():
        if arguments.only is None or arguments.only in name:
            print(name)
            report()


if __name__ == "__main__":
    main()
