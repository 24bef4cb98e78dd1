"""The demo's result as a table for people and as one JSON object for machines."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from rich import box
from rich.table import Table

from eplb_platform.demo.run import COSTLY_ONE_IN, COSTLY_REPEATS, UNEQUAL_PHASES, DemoResult, PhaseResult

PACKAGES = ("eplb_platform", "torch", "transformers", "numpy", "numba")


def phase_numbers(phase: PhaseResult) -> dict[str, float | int]:
    """The measures of one phase; balancedness is on the rank level, from the first commit on."""
    return {
        "balancedness": round(phase.load.mean_from(phase.first_commit), 4),
        "balancedness_worst_layer": round(phase.load.worst_layer_from(phase.first_commit), 4),
        "balancedness_all_forwards": round(phase.load.mean_from(0), 4),
        "first_commit_forward": phase.first_commit,
        "moved_experts": phase.moved_experts,
        "cycles": phase.cycles,
        "failed_cycles": phase.failed_cycles,
        "forwards": len(phase.forward_ms),
        "forward_ms_median": round(float(np.median(phase.forward_ms)), 3),
        "forward_ms_max": round(float(phase.forward_ms.max()), 3),
        "stall_ms_max": round(phase.stall_ms_max, 3),
    }


def as_json(result: DemoResult) -> dict[str, object]:
    """Everything that the table says, and with what it was measured."""
    options = result.settings.options
    return {
        "phases": {name: phase_numbers(phase) for name, phase in result.phases.items()},
        "unequal_experts": {name: unequal_numbers(phase) for name, phase in result.unequal.items()},
        "tokens_identical": not result.different_tokens,
        "tokens": sum(len(tokens) for tokens in next(iter(result.phases.values())).tokens),
        "faults": result.faults,
        "text_mix": [
            {"forwards": [stretch.start, stretch.end], "texts": stretch.label}
            for stretch in result.schedule.stretches
        ],
        "config": {
            "ranks": options.ranks,
            "redundant_experts": result.settings.redundant_experts,
            "model": str(options.model),
            "texts": [str(path) for path in options.texts],
            "backend": options.backend,
            "seed": options.seed,
            "heat_interval": options.heat_interval,
            "plan_interval": options.plan_interval,
            "steps": options.steps,
        },
        "expert_map_record_path": str(options.expert_map_record_path),
        "expert_map_path": str(options.expert_map_path or options.expert_map_record_path),
        "picture": str(options.picture),
        "versions": _versions(),
    }


def unequal_numbers(phase: PhaseResult) -> dict[str, float | int | None]:
    """The measures of a phase whose experts cost different time, before the first commit and from it on."""
    commit = phase.first_commit
    before, after = phase.time_balancedness or (None, None)
    return {
        "balancedness_before": round(phase.load.mean_until(commit), 4),
        "balancedness": round(phase.load.mean_from(commit), 4),
        "time_balancedness_before": None if before is None else round(before, 4),
        "time_balancedness": None if after is None else round(after, 4),
        "forward_ms_median_before": round(float(np.median(phase.forward_ms[: commit or None])), 3),
        "forward_ms_median": round(float(np.median(phase.forward_ms[commit:])), 3),
        "forwards": len(phase.forward_ms),
        "moved_experts": phase.moved_experts,
        "failed_cycles": phase.failed_cycles,
        "profiling_share_of_forward": round(phase.profiling_share, 4),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def table(result: DemoResult) -> Table:
    """A row for each phase."""
    options = result.settings.options
    shape = result.settings.shape
    drawn = Table(
        title=f"{options.ranks} ranks, {shape.num_layers} layers of {shape.num_logical_experts} experts "
        f"+ {result.settings.redundant_experts} redundant, {options.steps} forward passes a phase",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    drawn.add_column("phase", no_wrap=True)
    for heading in ("balancedness", "worst\nlayer", "experts\nmoved", "cycles"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for heading in ("forward\nmedian", "forward\nlongest", "longest\nwait"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for name, phase in result.phases.items():
        drawn.add_row(name, *_cells(phase_numbers(phase)))
    return drawn


def unequal_table(result: DemoResult) -> Table:
    """Before balancing, by tokens, by time."""
    drawn = Table(title="experts of unequal cost", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    drawn.add_column("balanced", no_wrap=True)
    for heading in ("balancedness\nof tokens", "balancedness\nof time", "experts\nmoved", "forward\nmedian"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    by_tokens, by_time = (unequal_numbers(result.unequal[name]) for name in UNEQUAL_PHASES)
    for row, numbers, suffix in (
        ("not yet", by_tokens, "_before"),
        ("by tokens", by_tokens, ""),
        ("by time", by_time, ""),
    ):
        spent = numbers[f"time_balancedness{suffix}"]
        drawn.add_row(
            row,
            f"{numbers[f'balancedness{suffix}']:.3f}",
            "-" if spent is None else f"{spent:.3f}",
            f"{0 if suffix else numbers['moved_experts']}",
            f"{numbers[f'forward_ms_median{suffix}']:.1f} ms",
        )
    return drawn


def unequal_legend(result: DemoResult) -> str:
    """What the second table is of."""
    steps = max(len(phase.forward_ms) for phase in result.unequal.values())
    share = max(phase.profiling_share for phase in result.unequal.values())
    return (
        f"the first {steps} forward passes again, where one expert in {COSTLY_ONE_IN}, neighbours, does its "
        f"work {COSTLY_REPEATS} times\nof time: what a rank's experts took by its timers, summed over passes "
        f"before and after the first commit\nmeasuring took {share:.1%} of the forward passes' time"
    )


LEGEND = """\
balancedness: mean / max rank load of a forward pass and layer; its mean over layers, and that of the worst
layer, over the passes from the phase's first commit on; 1 is perfect
forward: time of a pass on its slowest rank; wait: longest time that balancing took from a pass"""


def _cells(numbers: dict[str, float | int]) -> list[str]:
    return [
        f"{numbers['balancedness']:.3f}",
        f"{numbers['balancedness_worst_layer']:.3f}",
        f"{numbers['moved_experts']}",
        f"{numbers['cycles']}",
        f"{numbers['forward_ms_median']:.1f} ms",
        f"{numbers['forward_ms_max']:.1f} ms",
        f"{numbers['stall_ms_max']:.1f} ms",
    ]
