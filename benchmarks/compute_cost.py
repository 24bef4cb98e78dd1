"""Balancedness of time where experts differ in what a token costs, planned by tokens and by measured cost.

A token costs each expert lognormal(0, sigma) milliseconds. Every pass is served in the initial layout, each
measurement off by a normal error; the profiles of all ranks are added up as a cycle does. Plans are made from
the load's expected tokens and a profile, and judged by the same tokens' true time: what is left is what the
profile gets wrong, and what no placement attains.

    tokens        planned by tokens alone
    apart         each expert timed by itself
    grouped       one time for all experts of a rank's layer, taken apart by the fit
    exact         the true cost, to see what is left to placement

    python benchmarks/compute_cost.py
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from numpy.typing import NDArray

from eplb_platform import ExpertMap, Topology, rebalance_experts
from eplb_platform.balance import balancedness, rank_load
from eplb_platform.cost import ExpertComputeProfiler

Floats = NDArray[np.float64]
KERNEL_MS, ACTIVATION_MS = 0.05, 0.02
"""Of a grouped kernel, whatever its tokens, and of each expert in it that has some."""


def expected_tokens(kind: str, layers: int, experts: int, draw: np.random.Generator) -> Floats:
    """[layers, experts], 1,000 tokens for the mean expert of a pass."""
    rows = [
        draw.permutation(1 / np.arange(1, experts + 1)) if kind == "zipf" else draw.lognormal(size=experts)
        for _ in range(layers)
    ]
    shares = np.stack(rows)
    return np.asarray(1000 * shares / shares.mean(axis=1, keepdims=True))


def profile(
    passes: list[NDArray[np.int64]], cost: Floats, held: ExpertMap, noise: float, grouped: bool,
    draw: np.random.Generator,
) -> tuple[Floats, float]:  # fmt: skip
    """What all ranks measured together, [layers, experts]; and the worst rank's residual of the fit.

    Batches differ in size and the experts' shares in each differ a little, as they do while serving.
    """
    layers, experts = cost.shape
    whole, residuals = ExpertComputeProfiler(layers, experts, warmup_steps=0), [0.0]
    by_rank = held.by_rank().astype(np.int64)
    for rank in range(held.topology.num_ranks):
        of_rank = ExpertComputeProfiler(layers, experts, warmup_steps=0)
        slots = by_rank[:, rank]
        rows = np.arange(layers)[:, None]
        for tokens in passes:
            here = tokens[rows, slots] // held.replica_count[rows, slots]
            spent = here * cost[rows, slots]
            if grouped:
                total = KERNEL_MS + (spent + ACTIVATION_MS * (here > 0)).sum(axis=1)
                of_rank.profile_grouped_pass(slots, here, total * (1 + noise * draw.normal(size=layers)))
            else:
                of_rank.profile_pass(slots, here, spent * (1 + noise * draw.normal(size=spent.shape)))
        whole.add_totals(of_rank.get_totals())
        if grouped:
            residuals.append(float(np.nanmax(of_rank.grouped_residual())))
    return whole.get_expert_compute_weights(), max(residuals)


def run(kind: str, given: argparse.Namespace) -> dict[str, float]:
    draw = np.random.default_rng(given.seed)
    expected = expected_tokens(kind, given.layers, given.experts, draw)
    cost = draw.lognormal(0, given.sigma, expected.shape)
    topology = Topology(given.ranks)
    held = ExpertMap.initial(given.layers, given.experts, topology, given.redundant_experts)
    passes = [
        draw.poisson(expected * draw.lognormal(0, 0.5) * draw.lognormal(0, given.drift, expected.shape))
        for _ in range(given.passes)
    ]
    slots = given.experts + given.redundant_experts

    def reached(by: Floats | None, alpha: float) -> float:
        plan = rebalance_experts(
            expected, num_physical_experts=slots, topology=topology, algorithm="compute_aware",
            compute_cost=by, alpha=alpha,
        )  # fmt: skip
        return float(balancedness(rank_load(plan.expert_map, expected * cost)).mean())

    apart, _ = profile(passes, cost, held, given.noise, False, draw)
    grouped, residual = profile(passes, cost, held, given.noise, True, draw)
    return {
        "tokens": reached(None, 0.0),
        "apart_half": reached(apart, 0.5),
        "apart": reached(apart, 1.0),
        "grouped": reached(grouped, 1.0),
        "exact": reached(cost, 1.0),
        "apart_error": float(np.nanmedian(np.abs(apart / cost - 1))),
        "grouped_error": float(np.nanmedian(np.abs(grouped / cost - 1))),
        "grouped_residual": residual,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--redundant-experts", type=int, default=32)
    parser.add_argument("--passes", type=int, default=600, help="that are measured")
    parser.add_argument("--sigma", type=float, default=0.3, help="of the cost of a token")
    parser.add_argument("--noise", type=float, default=0.05, help="of a measurement")
    parser.add_argument("--drift", type=float, default=0.3, help="of an expert's tokens from pass to pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results = {kind: run(kind, given) for kind in ("zipf", "lognormal")}
    if given.json:
        print(json.dumps(results))
        return
    print(
        f"{given.experts} experts + {given.redundant_experts} on {given.ranks} ranks, {given.layers} layers; "
        f"cost of a token lognormal({given.sigma:g}), noise {100 * given.noise:g} %, {given.passes} passes"
    )
    print(f"{'balancedness of time':24}  tokens  apart, alpha 0.5   apart  grouped   exact")
    for kind, found in results.items():
        print(
            f"{kind:24}{found['tokens']:8.4f}{found['apart_half']:18.4f}{found['apart']:8.4f}"
            f"{found['grouped']:9.4f}{found['exact']:8.4f}"
        )
    for kind, found in results.items():
        errors = f"{100 * found['apart_error']:.2f} % apart, {100 * found['grouped_error']:.2f} % grouped"
        print(f"{kind}: median error of a cost {errors}; residual of the fit {found['grouped_residual']:.3f}")


if __name__ == "__main__":
    main()
