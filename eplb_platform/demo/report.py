"""The demo's result as a table for people and as one JSON object for machines."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from rich import box
from rich.table import Table

from eplb_platform.demo.run import DemoResult, PhaseResult

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
