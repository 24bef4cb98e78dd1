"""TensorRT-LLM's documented flow: statistics in, report, moe_load_balancer.yaml out, report again.

    python benchmarks/tensorrt_llm_flow.py

Seeded load of 58 layers x 256 experts at EP 32 is written as the statistics folder that TensorRT-LLM records.
A map for 36 ranks x 8 slots is planned on its first iterations by `eplb plan` and judged by `eplb report` on
the later ones, as a user would do it. Beside it stands a map by the method that TensorRT-LLM documents, in
code of our own: replicas by a heap, then the longest first onto the least loaded rank.
"""

from __future__ import annotations

import argparse
import heapq
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.offline.synthetic_load import SYNTHETIC_LOADS, LoadShape
from eplb_platform.records import tensorrt_llm_statistics, tensorrt_llm_yaml
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

EP_BEFORE, EP_AFTER, SLOTS = 32, 36, 8
FIRST_LAYER, TOP_K, TOKENS = 3, 8, 4096
LOADS = ("steady", "drifting", "switching")


def greedy_map(load: NDArray[np.float64], topology: Topology, slots_per_rank: int) -> ExpertMap:
    """load: [layers, logical]. Each further replica goes to the expert whose replicas are hottest; then every
    replica, hottest first, to the least loaded rank with a free slot.
    """
    rows = [_greedy_layer(row.tolist(), topology.num_ranks, slots_per_rank) for row in load]
    return ExpertMap(rows, load.shape[1], topology)


def _greedy_layer(load: list[float], num_ranks: int, slots_per_rank: int) -> list[int]:
    count = [1] * len(load)
    hottest = [(-tokens, expert) for expert, tokens in enumerate(load)]
    heapq.heapify(hottest)
    for _ in range(num_ranks * slots_per_rank - len(load)):
        _, expert = hottest[0]
        count[expert] += 1
        heapq.heapreplace(hottest, (-load[expert] / count[expert], expert))
    replicas = sorted(
        ((load[expert] / number, expert) for expert, number in enumerate(count) for _ in range(number)),
        key=lambda replica: -replica[0],
    )
    ranks: list[tuple[float, int]] = [(0.0, rank) for rank in range(num_ranks)]
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for tokens, expert in replicas:
        taken, rank = heapq.heappop(ranks)
        held[rank].append(expert)
        if len(held[rank]) < slots_per_rank:
            heapq.heappush(ranks, (taken + tokens, rank))
    return [expert for experts in held for expert in experts]


def recorded_load(kind: str, layers: int, iterations: int, seed: int) -> LoadTrace:
    """Sampled from shares that stay the same (steady), or of fields of use that come and go."""
    if kind == "steady":
        rng = np.random.default_rng(seed)
        shares = rng.lognormal(sigma=1.0, size=(layers, 256))
        shares /= shares.sum(axis=1, keepdims=True)
        load = rng.multinomial(TOKENS * TOP_K, shares, size=(iterations, layers))
    else:
        shape = LoadShape(layers, 256, num_collections=1, num_forwards=iterations, tokens_per_forward=TOKENS)
        load = np.concatenate(SYNTHETIC_LOADS[kind](shape, seed))
    metadata = {"first_moe_layer": str(FIRST_LAYER), "num_experts_per_token": str(TOP_K)}
    return LoadTrace(
        load.astype(np.int32), np.full(iterations, 2, dtype=np.uint8), metadata | {"ep_size": str(EP_BEFORE)}
    )


def flow(folder: Path, trace: LoadTrace) -> tuple[float, float, float]:
    """The imbalance ratios before, with the greedy map and with ours, on the later half of the iterations."""
    statistics, ours, greedy = (folder / name for name in ("statistics", "ours.yaml", "greedy.yaml"))
    tensorrt_llm_statistics.write(statistics, trace)
    half = trace.num_steps // 2
    seen, unseen = f"0-{half}", f"{half}-{trace.num_steps}"
    ranks = ("--ep-size", str(EP_AFTER))
    num_slots = str(EP_AFTER * SLOTS)
    eplb("plan", str(statistics), "--iter-range", seen, *ranks, "--num-slots", num_slots, "-o", str(ours))
    load = trace.expert_load[:half].sum(axis=0, dtype=np.float64)
    planned = greedy_map(load, Topology(EP_AFTER), SLOTS)
    tensorrt_llm_yaml.write(greedy, planned, first_moe_layer=FIRST_LAYER)
    before = imbalance_ratio(statistics, unseen)
    after = [imbalance_ratio(statistics, unseen, *ranks, "--map", str(path)) for path in (greedy, ours)]
    return before, after[0], after[1]


def imbalance_ratio(statistics: Path, iterations: str, *arguments: str) -> float:
    """What `eplb report` prints as the average, of the last layout."""
    shown = eplb("report", str(statistics), "--iter-range", iterations, *arguments, "--json")
    return float(json.loads(shown)["layouts"][-1]["average"]["imbalance_ratio"])


def eplb(*arguments: str) -> str:
    program = "from eplb_platform.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--iterations", type=int, default=200, help="half of them are planned on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    half = options.iterations // 2
    print(f"imbalance ratio, average of {options.layers} layers; planned on iterations 0-{half},")
    print(f"judged on {half}-{options.iterations}")
    print(f"{'load':<10} {f'EP {EP_BEFORE} before':>13} {'heap, longest first':>20} {'eplb plan':>10}")
    for kind in LOADS:
        with tempfile.TemporaryDirectory() as folder:
            trace = recorded_load(kind, options.layers, options.iterations, options.seed)
            before, greedy, ours = flow(Path(folder), trace)
        print(f"{kind:<10} {before:>13.4f} {greedy:>20.4f} {ours:>10.4f}")


if __name__ == "__main__":
    main()
