"""`eplb bench`: algorithms and peers side by side, on the same seeded or recorded loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eplb_platform.algorithms import AlgorithmError
from eplb_platform.cli import BadInput, bad_input
from eplb_platform.cli.files import read_trace
from eplb_platform.offline.bench import (
    Contender,
    Load,
    Result,
    Shape,
    contenders,
    initial_balancedness,
    measure,
)
from eplb_platform.offline.synthetic_load import SYNTHETIC_LOADS, LoadShape

DEFAULT_SHAPES = ("64x64x8", "64x80x16", "128x144x16", "256x288x32", "256x288x32x4x8")


@dataclass(frozen=True)
class Request:
    """What the command was asked for; see the options of `eplb bench`."""

    traces: Sequence[Path] = ()
    loads: Sequence[str] = ()
    shapes: Sequence[str] = ()
    algorithms: Sequence[str] = ()
    num_layers: int = 4
    num_collections: int = 6
    num_forwards: int = 40
    num_windows: int = 40
    tokens_per_forward: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """A load and the shape it is planned for. collections: [forwards, layers, logical] each"""

    load: str
    shape: Shape
    collections: Sequence[Load] = field(repr=False)


@dataclass(frozen=True)
class Report:
    """What one contender made of one case; no result where it cannot run, and the reason."""

    case: Case
    contender: Contender
    result: Result | None
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """All reports, case by case."""

    reports: Sequence[Report]

    def print(self, console: Console) -> None:
        """A table for each case, for people."""
        for case, reports in self._by_case():
            console.print(_title(case), markup=False, highlight=False, soft_wrap=True)
            console.print(_table([report for report in reports if report.result is not None]))
        for line in self._not_run():
            console.print(line, markup=False)
        console.print(
            "first plan: from nothing, on the first collection; then plans from the map in use.\n"
            "above bound: by which part the hottest rank is above what is proven to be possible.\n"
            "unseen: balancedness of every forward pass of the collection after the one planned on.\n"
            "moved: experts that ranks newly receive in a cycle, of all slots. Medians of one thread's time."
        )

    def as_dicts(self) -> list[dict[str, object]]:
        """For JSON: one object for each contender and case."""
        return [
            {
                "load": report.case.load,
                "shape": str(report.case.shape),
                "layers": report.case.collections[0].shape[1],
                "collections": len(report.case.collections),
                "initial": initial_balancedness(report.case.collections, report.case.shape),
                "contender": report.contender.name,
                "peer": report.contender.is_peer,
                "result": None if report.result is None else asdict(report.result),
                "reason": report.reason,
            }
            for report in self.reports
        ]

    def _not_run(self) -> list[str]:
        """A line for each contender that could not run, and for each case that it could not run on."""
        lines = [
            f"{report.contender.name}: {report.reason}"
            if report.contender.algorithm is None
            else f"{report.contender.name} on {report.case.load} {report.case.shape}: {report.reason}"
            for report in self.reports
            if report.result is None
        ]
        return list(dict.fromkeys(lines))

    def _by_case(self) -> Iterator[tuple[Case, list[Report]]]:
        for case in dict.fromkeys(id(report.case) for report in self.reports):
            reports = [report for report in self.reports if id(report.case) == case]
            yield reports[0].case, reports


def bench(request: Request, progress: Callable[[str, int, int], None]) -> Outcome:
    """Measure every contender on every case. Raises BadInput for what cannot be read or planned.

    progress: told what is measured now, how many measurements are done, and how many there are
    """
    try:
        cases = _cases(request)
        rivals = contenders(request.algorithms or None)
    except BadInput:
        raise
    except (ValueError, AlgorithmError) as error:
        raise bad_input("bench", error) from error
    reports: list[Report] = []
    total = len(cases) * len(rivals)
    warm = set()
    for case in cases:
        for rival in rivals:
            progress(f"{case.load} {case.shape} {rival.name}", len(reports), total)
            if rival.algorithm is not None and rival.name not in warm:
                rival.algorithm.warm_up()
                warm.add(rival.name)
            reports.append(_report(case, rival, request.num_windows))
    progress("done", total, total)
    return Outcome(reports)


def _report(case: Case, rival: Contender, num_windows: int) -> Report:
    if rival.algorithm is None:
        return Report(case, rival, None, rival.reason)
    try:
        return Report(
            case, rival, measure(rival.algorithm, case.collections, case.shape, num_windows=num_windows)
        )
    except (ArithmeticError, AssertionError, AlgorithmError, LookupError, ValueError) as error:
        if not rival.is_peer:
            raise BadInput(f"bench: {rival.name} on {case.load} {case.shape}: {error}") from error
        # Peers refuse shapes in ways of their own; the others' results still count.
        return Report(case, rival, None, f"fails: {error!r}")


def _cases(request: Request) -> list[Case]:
    shapes = [Shape.parse(text) for text in request.shapes or DEFAULT_SHAPES]
    names = request.loads or (() if request.traces else tuple(SYNTHETIC_LOADS))
    for name in names:
        if name not in SYNTHETIC_LOADS:
            raise BadInput(f"bench: no load {name!r} (known: {', '.join(SYNTHETIC_LOADS)})")
    return [
        *(_synthetic(name, shape, request) for name in names for shape in shapes),
        *(_recorded(request, shapes) if request.traces else ()),
    ]


def _synthetic(name: str, shape: Shape, request: Request) -> Case:
    size = LoadShape(
        num_layers=request.num_layers,
        num_experts=shape.num_experts,
        num_groups=shape.num_groups,
        num_collections=request.num_collections,
        num_forwards=request.num_forwards,
        tokens_per_forward=request.tokens_per_forward,
    )
    return Case(name, shape, SYNTHETIC_LOADS[name](size, request.seed))


def _recorded(request: Request, shapes: Sequence[Shape]) -> list[Case]:
    """The traces in order as one sequence of collections, none of which mixes two of them."""
    collections: list[Load] = []
    for path in request.traces:
        loads = read_trace(path, "trace").expert_load
        if collections and loads.shape[1:] != collections[0].shape[1:]:
            raise BadInput(
                f"bench: {path} has [layers, experts] {list(loads.shape[1:])}, "
                f"{request.traces[0]} {list(collections[0].shape[1:])}: one model's traces are expected"
            )
        if not len(loads):
            raise BadInput(f"bench: {path} has no steps")
        pieces = max(1, len(loads) // request.num_forwards)
        collections += [piece.astype(np.float64) for piece in np.array_split(loads, pieces)]
    num_experts = collections[0].shape[2]
    fitting = [shape for shape in shapes if shape.num_experts == num_experts]
    if not fitting:
        raise BadInput(
            f"bench: {request.traces[0]} has {num_experts} experts, which none of the shapes "
            f"{', '.join(map(str, shapes))} has: give --shape {num_experts}xSLOTSxRANKS"
        )
    return [Case(" + ".join(path.stem for path in request.traces), shape, collections) for shape in fitting]


def _title(case: Case) -> str:
    initial = initial_balancedness(case.collections, case.shape)
    return (
        f"{case.load}, {case.shape}, {case.collections[0].shape[1]} layers, "
        f"{len(case.collections)} collections; balancedness as engines start {initial:.3f}"
    )


def _table(reports: Sequence[Report]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("first plan", "above bound", "ms", "then", "above bound", "unseen", "moved", "ms"):
        table.add_column(column, justify="right", min_width=6)
    for report in reports:
        name = f"{report.contender.name} (peer)" if report.contender.is_peer else report.contender.name
        if report.result is not None:
            table.add_row(name, *_cells(report.result))
    return table


def _cells(result: Result) -> list[str]:
    return [
        f"{result.cold:.4f}",
        f"{result.cold_above_bound:.2%}",
        f"{result.cold_ms:.1f}",
        _shown(result.in_window, ".4f"),
        _shown(result.above_bound, ".2%"),
        _shown(result.next_forward, ".4f"),
        _shown(result.moved_share, ".1%"),
        _shown(result.plan_ms, ".1f"),
    ]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
