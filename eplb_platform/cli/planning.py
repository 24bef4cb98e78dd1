"""`eplb plan`: an expert map from load traces, with what it promises layer by layer."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms import DEFAULT_ALGORITHM, AlgorithmError, Plan, rebalance_experts
from eplb_platform.algorithms.compute_aware import ComputeAware
from eplb_platform.algorithms.discovery import OptionValue, make_algorithm
from eplb_platform.algorithms.survival import Survival
from eplb_platform.algorithms.survival import warm_up as warm_up_survival
from eplb_platform.balance import window_balancedness
from eplb_platform.cli import BadInput, bad_input
from eplb_platform.cli.files import (
    MAP_FORMAT_OF_SUFFIX,
    check_output,
    iterations,
    read_trace,
    serving_line,
    write_map,
)
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.offline.report import metadata_number
from eplb_platform.records import compute_cost
from eplb_platform.records.load_trace import LoadTrace, release_pages
from eplb_platform.topology import Topology

# Steps that are summed at once: bounds the memory that a long trace takes.
_STEPS_AT_ONCE = 64
_WORDS: dict[str, OptionValue] = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True)
class Request:
    """What the command was asked for; see the options of `eplb plan`."""

    traces: Sequence[Path]
    output: Path
    ep_size: int | None = None
    num_slots: int | None = None
    num_nodes: int = 1
    num_expert_groups: int = 1
    algorithm: str | None = None
    current: Path | None = None
    options: Sequence[str] = ()
    phase: str = "all"
    num_windows: int = 16
    compute_cost: Path | None = None
    iter_range: str | None = None
    survive: Survival = "none"


@dataclass(frozen=True, eq=False)
class Outcome:
    """A plan, the balancedness before it, [layers], and how long planning took."""

    plan: Plan
    before: NDArray[np.float64]
    seconds: float
    output: Path
    survive: Survival = "none"

    def lines(self) -> list[str]:
        """The summary, for people."""
        held = self.plan.expert_map
        format = MAP_FORMAT_OF_SUFFIX[self.output.suffix.lower()]
        table = [_row(str(layer), *columns) for layer, columns in enumerate(self._columns())]
        overall = self._overall()
        return [
            f"{'layer':>7} {'before':>7} {'after':>7} {'bound':>7} {'moved':>7}",
            *table,
            _row("mean", *overall["mean"]),
            _row("worst", *overall["worst"]),
            "balancedness (mean / max rank load, 1 is perfect) on this load; no map has more than the bound",
            f"{self.plan.algorithm}: {held.num_layers} layers of {held.num_logical_experts} experts in "
            f"{held.num_physical_experts} slots of {held.topology.num_ranks} ranks: "
            f"{int(self.plan.moved_experts.sum())} experts moved, planned in {self.seconds * 1e3:.3g} ms",
            *self._price(),
            f"map: {self.output}, served with by {serving_line(self.output, format, held)}",
        ]

    def _price(self) -> list[str]:
        """What surviving a loss costs."""
        free = self.plan.unconstrained
        if free is None:
            return []
        moved, moved_free = int(self.plan.moved_experts.sum()), int(free.moved_experts.sum())
        return [
            f"survives the loss of any one {self.survive}: balancedness {self.plan.balancedness.mean():.4f}, "
            f"{free.balancedness.mean():.4f} without that; {moved} experts moved, {moved_free} without"
        ]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        names = ("before", "after", "bound", "moved_experts")
        return {
            "algorithm": self.plan.algorithm,
            "output": str(self.output),
            "seconds": self.seconds,
            "moved_experts": int(self.plan.moved_experts.sum()),
            **self._price_as_dict(),
            "layers": [dict(zip(names, columns, strict=True)) for columns in self._columns()],
        } | {name: dict(zip(names, row, strict=True)) for name, row in self._overall().items()}

    def _price_as_dict(self) -> dict[str, object]:
        free = self.plan.unconstrained
        if free is None:
            return {}
        without = {
            "balancedness": float(free.balancedness.mean()),
            "moved_experts": int(free.moved_experts.sum()),
        }
        return {"survive": self.survive, "without_survival": without}

    def _columns(self) -> Iterator[tuple[float, float, float, int]]:
        """Of each layer: balancedness before and after, its bound, moved experts."""
        return zip(
            self.before.tolist(),
            self.plan.balancedness.tolist(),
            (1 / self.plan.lower_bound).tolist(),
            self.plan.moved_experts.tolist(),
            strict=True,
        )

    def _overall(self) -> dict[str, tuple[float, float, float, float]]:
        by_layer = np.array(list(self._columns()))
        mean, least, most = by_layer.mean(axis=0), by_layer.min(axis=0), by_layer.max(axis=0)
        return {
            "mean": (float(mean[0]), float(mean[1]), float(mean[2]), float(mean[3])),
            "worst": (float(least[0]), float(least[1]), float(least[2]), float(most[3])),
        }


def _measured_cost(path: Path) -> NDArray[np.float64]:
    cost = compute_cost.read(path)
    if np.isnan(cost).all():
        raise BadInput(f"plan: {path}: no expert was profiled, expected the time of at least one")
    return cost


def make_plan(request: Request) -> Outcome:
    """Plan and write the map. Raises BadInput for what cannot be read, planned or written."""
    try:
        check_output(
            request.output, [*request.traces, *([request.compute_cost] if request.compute_cost else [])]
        )
        traces = [(path, read_trace(path)) for path in request.traces]
        load = _windows(request, traces)
        current, topology = _current(request, load.shape[2])
        options = _options(request.options)
        cost = None if request.compute_cost is None else _measured_cost(request.compute_cost)
        algorithm = request.algorithm or (DEFAULT_ALGORITHM if cost is None else ComputeAware.name)
        # Apart from the plan, whose time is told: compiling takes longer, but once.
        engine = make_algorithm(algorithm, options)
        engine.warm_up()
        if request.survive != "none":
            warm_up_survival()
        started = time.perf_counter()
        plan = rebalance_experts(
            load,
            num_physical_experts=request.num_slots,
            topology=topology,
            num_expert_groups=request.num_expert_groups,
            current=current,
            algorithm=algorithm,
            compute_cost=cost,
            survive=request.survive,
            **options,
        )
        seconds = time.perf_counter() - started
        before = window_balancedness(current or _initial(plan), engine.weigh(load, cost))
        _save(request, plan.expert_map, metadata_number(traces[0][1], "first_moe_layer"))
    except (ValueError, AlgorithmError) as error:
        raise bad_input("plan", error) from error
    return Outcome(plan, before, seconds, request.output, request.survive)


def _save(request: Request, expert_map: ExpertMap, first_moe_layer: int) -> None:
    """Write the map in the format that the output's suffix names, its layers numbered as the load's."""
    format = MAP_FORMAT_OF_SUFFIX.get(request.output.suffix.lower())
    if format is None:
        expert_map.save(request.output)  # which says what suffixes there are
    else:
        write_map(request.output, expert_map, format, first_moe_layer)


def _initial(plan: Plan) -> ExpertMap:
    """The layout that engines start with, in the shape of the plan."""
    held = plan.expert_map
    return ExpertMap.initial(
        held.num_layers, held.num_logical_experts, held.topology, held.num_redundant_experts
    )


def _current(request: Request, num_experts: int) -> tuple[ExpertMap | None, Topology]:
    """The map in use, if there is one, and the ranks and nodes to plan for."""
    ranks = request.ep_size
    if request.current is None:
        if ranks is None or request.num_slots is None:
            raise BadInput(
                f"plan: give --ep-size and --num-slots ({num_experts} experts and redundant ones, a multiple "
                "of the ranks: eplb advise finds both), or the map in use with --current"
            )
        least = -(-num_experts // ranks) * ranks
        wanted = f"expected a multiple of the {ranks} ranks: {least}, {least + ranks}, ..."
        if request.num_slots < num_experts:
            short = f"{num_experts} experts do not fit in --num-slots {request.num_slots}"
            raise BadInput(f"plan: {short}, {wanted}")
        if request.num_slots % ranks:
            raise BadInput(f"plan: --num-slots is {request.num_slots}, {wanted}")
        return None, Topology(ranks, request.num_nodes)
    if ranks is None:
        ranks = ExpertMap.load(request.current, num_logical_experts=num_experts).topology.num_ranks
    topology = Topology(ranks, request.num_nodes)
    return ExpertMap.load(request.current, num_logical_experts=num_experts, topology=topology), topology


def _windows(request: Request, traces: Sequence[tuple[Path, LoadTrace]]) -> NDArray[np.float64]:
    """[windows, layers, logical], tokens: the steps of all traces in order, each trace by itself."""
    chosen = [_steps(trace, request.phase, iterations(request.iter_range)) for _, trace in traces]
    first_path, first = traces[0]
    for (path, trace), steps in zip(traces, chosen, strict=True):
        if trace.expert_load.shape[1:] != first.expert_load.shape[1:]:
            raise BadInput(
                f"plan: {path} has [layers, experts] {list(trace.expert_load.shape[1:])}, "
                f"{first_path} {list(first.expert_load.shape[1:])}: one model's traces are expected"
            )
        if not steps.size:
            asked = "" if request.iter_range is None else f" in iterations {request.iter_range}"
            raise BadInput(f"plan: {path} has no steps of phase {request.phase!r}{asked}")
    total = sum(steps.size for steps in chosen)
    windows: list[NDArray[np.float64]] = []
    for (_, trace), steps in zip(traces, chosen, strict=True):
        pieces = min(steps.size, max(1, round(request.num_windows * steps.size / total)))
        windows += [_sum(trace, piece) for piece in np.array_split(steps, pieces)]
    return np.stack(windows)


def _steps(trace: LoadTrace, phase: str, wanted: range | None) -> NDArray[np.intp]:
    """The steps that count; mixed ones hold tokens of both phases and always do."""
    counts = np.ones(trace.num_steps, dtype=np.bool_)
    if phase != "all":
        counts = (trace.phase == Phase[phase.upper()]) | (trace.phase == Phase.MIXED)
    if wanted is not None:
        number = metadata_number(trace, "first_iteration") + np.arange(trace.num_steps)
        counts = counts & (number >= wanted.start) & (number < wanted.stop)
    return np.flatnonzero(counts)


def _sum(trace: LoadTrace, steps: NDArray[np.intp]) -> NDArray[np.float64]:
    total = np.zeros(trace.expert_load.shape[1:])
    for start in range(0, steps.size, _STEPS_AT_ONCE):
        total += trace.expert_load[steps[start : start + _STEPS_AT_ONCE]].sum(axis=0, dtype=np.float64)
        release_pages(trace.expert_load)
    return total


def _options(given: Sequence[str]) -> dict[str, OptionValue]:
    """The algorithm's options from `key=value`; true, false, none, numbers and numbers with commas between
    them are read as such.
    """
    named = inspect.signature(rebalance_experts).parameters
    options: dict[str, OptionValue] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise BadInput(f"plan: --option {text}: expected key=value")
        if key in named:
            raise BadInput(f"plan: --option {text}: {key!r} is no option of an algorithm")
        options[key] = _value(value)
    return options


def _value(text: str) -> OptionValue:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if "," in text:
        with suppress(ValueError):
            return tuple(float(part) for part in text.split(","))
    return text


def _row(name: str, before: float, after: float, bound: float, moved: float) -> str:
    return f"{name:>7} {before:7.4f} {after:7.4f} {bound:7.4f} {moved:7.4g}"
