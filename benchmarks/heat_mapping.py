"""What mapping tokens to physical experts and counting them costs on the CPU backend.

Beside it, in the same run: a bare `torch.bincount` of the same physical ids, and a mapping in plain torch.
They take turns, so that whatever else the machine does meets all of them; medians are compared.

    python benchmarks/heat_mapping.py [--tokens 4096 --top-k 8 --logical 256 --physical 288] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

from eplb_platform.backend import Backend, load_backend
from eplb_platform.dispatch import even_table
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

TARGET = 4.0
"""Times a bare bincount."""


@dataclass(frozen=True)
class Case:
    """One load: `tokens` tokens choose `top_k` of `logical` experts, which have `physical` slots."""

    tokens: int
    top_k: int
    logical: int
    physical: int
    seed: int


@dataclass(frozen=True)
class Workload:
    """ids: [tokens, top_k], of Zipf-distributed popularity; the table and counts of one layer."""

    ids: torch.Tensor
    table: torch.Tensor
    counts: torch.Tensor
    load: torch.Tensor
    physical_ids: torch.Tensor


def make_workload(case: Case, backend: Backend) -> Workload:
    generator = torch.Generator().manual_seed(case.seed)
    popularity = 1.0 / torch.arange(1, case.logical + 1)
    ids = torch.multinomial(popularity.expand(case.tokens, -1), case.top_k, generator=generator)
    expert_map = ExpertMap.initial(
        1, case.logical, Topology(1), num_redundant_experts=case.physical - case.logical
    )
    logical_to_physical, replica_count = even_table(expert_map, 4)
    table, counts = torch.tensor(logical_to_physical[0]), torch.tensor(replica_count[0])
    load = torch.zeros(case.physical, dtype=torch.int64)
    return Workload(ids, table, counts, load, backend.map_and_record(ids, table, counts, None))


def map_in_plain_torch(work: Workload) -> torch.Tensor:
    """The same with indexing, by row modulo replicas."""
    rows = torch.arange(work.ids.shape[0]).unsqueeze(1)
    physical = work.table[work.ids, rows % work.counts[work.ids]].long()
    work.load.add_(torch.bincount(physical.flatten(), minlength=work.load.numel()))
    return physical


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Median microseconds of each contender."""
    backend = load_backend("cpu")
    work = make_workload(case, backend)
    flat = work.physical_ids.flatten()
    contenders: dict[str, Callable[[], object]] = {
        "torch.bincount": lambda: torch.bincount(flat, minlength=case.physical),
        "map_and_record": lambda: backend.map_and_record(work.ids, work.table, work.counts, work.load),
        "without recording": lambda: backend.map_and_record(work.ids, work.table, work.counts, None),
        "plain torch": lambda: map_in_plain_torch(work),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 10):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            if round_ >= 10:
                times[name].append((time.perf_counter() - started) * 1e6)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("tokens", 4096), ("top-k", 8), ("logical", 256), ("physical", 288), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(options.tokens, options.top_k, options.logical, options.physical, options.seed)
    medians = measure(case, options.rounds)
    bincount = medians["torch.bincount"]
    if options.json:
        ratios = {name: value / bincount for name, value in medians.items()}
        print(json.dumps({"case": asdict(case), "median_us": medians, "times_bincount": ratios}))
        return
    print(
        f"{case.tokens} tokens x top-{case.top_k} to {case.physical} physical experts, "
        f"1 thread, seed {case.seed}"
    )
    for name, value in medians.items():
        print(f"  {name:18} {value:8.1f} us  {value / bincount:5.2f} x bincount")
    met = "met" if medians["map_and_record"] <= TARGET * bincount else "MISSED"
    print(f"  target: map_and_record at most {TARGET:g} x bincount: {met}")


if __name__ == "__main__":
    main()
