"""`eplb report`: what recorded load says, as it was placed and under any number of maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_platform.cli import BadInput, bad_input
from eplb_platform.cli.files import check_output, fitting, iterations, read_map, read_trace
from eplb_platform.expert_map import ExpertMap
from eplb_platform.offline.report import LayoutReport, RankStatistics, Report, make_report, metadata_number
from eplb_platform.offline.report_page import page
from eplb_platform.records.atomic import write_atomically
from eplb_platform.records.fault import RecordError, describe
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

HOTTEST = 3
INITIAL = "initial layout"


@dataclass(frozen=True)
class Request:
    """What the command was asked for; see the options of `eplb report`."""

    trace: Path
    ep_size: int | None = None
    iter_range: str | None = None
    maps: Sequence[Path] = ()
    html: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """The report, and the files that were written."""

    request: Request
    report: Report

    def lines(self) -> Iterator[str]:
        """Tables, for people."""
        report = self.report
        yield (
            f"{self.request.trace}: {report.num_steps} steps with tokens, {report.num_idle_steps} without, "
            f"{len(report.expert_load)} layers, {report.expert_load.shape[1]} experts"
        )
        for layout in report.layouts:
            held = layout.expert_map
            yield ""
            yield f"{layout.name}: {held.topology.num_ranks} ranks of {held.slots_per_rank} slots"
            yield "Load statistics:"
            yield from _statistics_table(layout.overall, report.first_layer)
        if len(report.by_phase) > 1:
            yield from self._phase_lines()
        yield ""
        yield "Experts:"
        yield f"{'layer':<7} {'drift':>7} {'chance':>7}  hottest experts (load / mean expert load)"
        for layer in range(len(report.expert_load)):
            yield (
                f"{report.first_layer + layer:<7} {_or_dash(report.drift[layer])} "
                f"{_or_dash(report.chance[layer])}  {self._hottest(layer)}"
            )
        yield ""
        yield "mean, std: tokens of a rank; imbalance-ratio: (max - mean) / mean, 0 is perfect; all of them"
        yield "taken at every step and averaged. balancedness: sum of mean / sum of max, 1 is perfect."
        yield f"drift: how the experts' shares change from one of {report.num_windows} windows to the next,"
        yield "0 to 1; chance: what shares that never change would show"
        for path in (self.request.html, self.request.plot):
            if path is not None:
                yield f"written: {path}"

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        report = self.report
        layers = range(len(report.expert_load))
        return {
            "trace": str(self.request.trace),
            "steps": report.num_steps,
            "idle_steps": report.num_idle_steps,
            "first_iteration": report.first_iteration,
            "layouts": [_layout_dict(layout, report.first_layer) for layout in report.layouts],
            "experts": [
                {
                    "layer": report.first_layer + layer,
                    "drift": _or_none(report.drift[layer]),
                    "chance": _or_none(report.chance[layer]),
                    "hottest": [
                        {"expert": expert, "relative_load": load}
                        for expert, load in report.hottest_experts(layer, HOTTEST)
                    ],
                }
                for layer in layers
            ],
            "html": None if self.request.html is None else str(self.request.html),
            "plot": None if self.request.plot is None else str(self.request.plot),
        }

    def _phase_lines(self) -> Iterator[str]:
        yield ""
        yield "Phases, average of the layers:"
        yield f"{'':<8} {'steps':>7} {'mean':>12} {'imbalance-ratio':>16} {'balancedness':>13}  layout"
        for phase in self.report.by_phase:
            for layout in self.report.layouts:
                if phase in layout.by_phase:
                    each = layout.by_phase[phase]
                    measures = f"{each.imbalance_ratio.mean():>16.6f} {each.balancedness.mean():>13.4f}"
                    yield (
                        f"{phase:<8} {each.num_steps:>7} {each.mean.mean():>12.1f} {measures}  {layout.name}"
                    )

    def _hottest(self, layer: int) -> str:
        hottest = self.report.hottest_experts(layer, HOTTEST)
        return ", ".join(f"{expert} ({load:.2f})" for expert, load in hottest) or "none: no load"


def make(request: Request) -> Outcome:
    """Read, project, and write the page and the picture. Raises BadInput."""
    try:
        for written in (request.html, request.plot):
            check_output(written, [request.trace, *request.maps])
        if request.html and request.plot and request.html.resolve() == request.plot.resolve():
            raise BadInput(f"--html and --plot are both {request.html}, expected two files")
        trace = read_trace(request.trace)
        layouts = _layouts(request, trace)
        report = make_report(trace, layouts, iterations=iterations(request.iter_range))
        if request.html is not None:
            content = page(report, f"Expert load of {request.trace.name}")
            write_atomically(request.html, content.encode())
        if request.plot is not None:
            from eplb_platform.offline.report_picture import draw

            draw(report, request.plot)
    except ImportError as error:
        raise BadInput(f"report: --plot needs the extra [demo], which is not installed: {error}") from error
    except OSError as error:
        place = error.filename or request.html or request.plot
        raise BadInput(f"report: {place}: {describe(error)}") from error
    except (RecordError, ValueError) as error:
        raise bad_input("report", error) from error
    return Outcome(request, report)


def _layouts(request: Request, trace: LoadTrace) -> Mapping[str, ExpertMap]:
    """The layout that engines start with, where the EP size is known, and the maps that were given."""
    topology = None if request.ep_size is None else Topology(request.ep_size)
    maps = {
        str(path): read_map(
            path,
            topology=fitting(path, topology),
            num_logical_experts=trace.num_logical_experts,
            num_layers=trace.num_layers,
        )
        for path in request.maps
    }
    initial = _initial(request, trace, next(iter(maps.values()), None))
    return maps if initial is None else {INITIAL: initial, **maps}


def _initial(request: Request, trace: LoadTrace, planned: ExpertMap | None) -> ExpertMap | None:
    """The start of the run that was recorded, as far as it can be known.

    Its EP size is what the record says, else --ep-size, else that of the first map; redundant experts it has
    only where the experts could not be shared evenly without those of the first map.
    """
    experts = trace.num_logical_experts
    ranks = metadata_number(trace, "ep_size") or request.ep_size
    if ranks is None and planned is not None:
        ranks = planned.topology.num_ranks
    if ranks is None:
        raise BadInput("report: give --ep-size or --map: the record does not say its EP size")
    if experts % ranks == 0:
        return ExpertMap.initial(trace.num_layers, experts, Topology(ranks))
    if planned is not None and planned.topology.num_ranks == ranks:
        redundant = planned.num_redundant_experts
        return ExpertMap.initial(trace.num_layers, experts, planned.topology, redundant)
    if planned is not None:
        return None
    raise BadInput(f"report: {experts} experts cannot be shared evenly by --ep-size {ranks}: give a --map")


def _statistics_table(each: RankStatistics, first_layer: int) -> Iterator[str]:
    """TensorRT-LLM's table, with balancedness to its right."""
    columns = ("mean", "std", "imbalance-ratio", "balancedness")
    values = (each.mean, each.std, each.imbalance_ratio, each.balancedness)
    texts = [_column(np.append(column, column.mean())) for column in values]
    widths = [max(map(len, (name, *text))) for name, text in zip(columns, texts, strict=True)]
    names = [str(first_layer + layer) for layer in range(len(each.mean))] + ["average"]
    yield " " * 7 + "".join(f"  {name:>{width}}" for name, width in zip(columns, widths, strict=True))
    for row, name in enumerate(names):
        yield f"{name:<7}" + "".join(
            f"  {text[row]:>{width}}" for text, width in zip(texts, widths, strict=True)
        )


def _column(values: NDArray[np.float64]) -> list[str]:
    """With six decimals, or as many fewer as all of them can do without, at least one."""
    texts = [f"{value:.6f}" for value in values.tolist()]
    spare = min(len(text) - len(text.rstrip("0")) for text in texts)
    return [text[: len(text) - min(spare, 5)] for text in texts]


def _layout_dict(layout: LayoutReport, first_layer: int) -> dict[str, object]:
    return {
        "name": layout.name,
        "ranks": layout.expert_map.topology.num_ranks,
        "slots_per_rank": layout.expert_map.slots_per_rank,
        "average": _averages(layout.overall),
        "phases": {
            name: {"steps": each.num_steps, **_averages(each)} for name, each in layout.by_phase.items()
        },
        "layers": [
            {
                "layer": first_layer + i,
                "mean": float(layout.overall.mean[i]),
                "std": float(layout.overall.std[i]),
                "imbalance_ratio": float(layout.overall.imbalance_ratio[i]),
                "balancedness": float(layout.overall.balancedness[i]),
            }
            for i in range(len(layout.overall.mean))
        ],
    }


def _averages(each: RankStatistics) -> dict[str, float]:
    return {
        "mean": float(each.mean.mean()),
        "std": float(each.std.mean()),
        "imbalance_ratio": float(each.imbalance_ratio.mean()),
        "balancedness": float(each.balancedness.mean()),
    }


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _or_dash(value: float) -> str:
    return f"{value:7.4f}" if math.isfinite(value) else f"{'-':>7}"
