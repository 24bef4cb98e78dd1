"""`eplb simulate`: algorithms while serving, on recorded load and in simulated time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eplb_platform.algorithms import AlgorithmError
from eplb_platform.cli import BadInput, bad_input
from eplb_platform.cli.estimating import Deployment, configuration, fewest_redundant
from eplb_platform.cli.files import check_output, iterations, read_map, read_trace
from eplb_platform.cli.tables import plain_lines, right_aligned
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.offline.report import metadata_number, steps_of
from eplb_platform.offline.serving import Setting
from eplb_platform.offline.simulate import Result, simulate
from eplb_platform.records.fault import RecordError, describe
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

LOW_PERCENTILE = 5


@dataclass(frozen=True)
class Request:
    """What the command was asked for; see the options of `eplb simulate`."""

    trace: Path
    algorithms: Sequence[str]
    deployment: Deployment = field(default_factory=Deployment)
    redundant_experts: int | None = None
    maps: Sequence[Path] = ()
    iter_range: str | None = None
    planning_time_s: float = 0.5
    settings: Sequence[str] = ()
    plot: Path | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """The results, the layout that engines start with first."""

    request: Request
    setting: Setting
    num_experts: int
    num_layers: int
    num_steps: int
    results: Sequence[Result]

    def print(self, console: Console) -> None:
        """A table, for people."""
        plain_lines(console, self._title())
        console.print(self._judged_table())
        if any(result.planning_s for result in self.results):
            console.print(self._moved_table())
        for result in self.results:
            if result.planning_s and not result.cycles and not result.failed_cycles:
                plain_lines(
                    console,
                    f"{result.name}: no cycle was completed in the {result.step_s.sum():.2g} s of the "
                    f"steps, of which a plan takes {self.setting.planning_s:g} s (--planning-time): a longer "
                    "trace is needed",
                )
            if result.failed_cycles:
                plain_lines(
                    console, f"{result.name}: {result.failed_cycles} cycles failed: {result.last_error}"
                )
        judged, unseen = len(self.results[0].step_s), self.setting.config.expert_heat_collection_interval
        plain_lines(
            console,
            f"Judged: {judged} steps with tokens after the first {unseen}, by maps planned on earlier ones.",
            "initial: as engines start. static: planned once, on the first collection.",
            "mean, p5, late: balancedness (mean / max rank load of a step, 1 is perfect) of all steps, of",
            "all but the worst 5 %, of the later half. prefill, decode, mixed: milliseconds of a step.",
            "moved: experts that ranks received. wait, swap: the longest in one step.",
            f"Times, tokens/s: estimates for {self.setting.profile.name}; docs/offline.md has the formulae.",
        )
        if self.request.plot is not None:
            plain_lines(console, f"written: {self.request.plot}")

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        config = self.setting.config
        return {
            "trace": str(self.request.trace),
            "steps": self.num_steps,
            "judged_steps": len(self.results[0].step_s),
            "layers": self.num_layers,
            "experts": self.num_experts,
            "redundant_experts": self.setting.num_redundant_experts,
            "ep_size": self.setting.topology.num_ranks,
            "nodes": self.setting.topology.num_nodes,
            "hardware": self.setting.profile.model_dump(),
            "eplb_config": config.model_dump(exclude_unset=True),
            "planning_time_s": self.setting.planning_s,
            "results": [self._result_dict(result) for result in self.results],
            "plot": None if self.request.plot is None else str(self.request.plot),
        }

    def _title(self) -> str:
        topology, config = self.setting.topology, self.setting.config
        return (
            f"{self.request.trace}: {self.num_steps} steps, {self.num_layers} layers, "
            f"{self.num_experts} experts + {self.setting.num_redundant_experts} redundant, "
            f"{topology.num_ranks} ranks on {topology.num_nodes} nodes; "
            f"collections of {config.expert_heat_collection_interval} steps"
        )

    def _phases(self) -> list[Phase]:
        present = set(self.results[0].phase.tolist())
        return [phase for phase in Phase if phase in present]

    def _judged_table(self) -> Table:
        steps = [phase.name.lower() for phase in self._phases()]
        table = right_aligned("mean", "p5", "late", *steps, "tokens/s", "gain")
        first = self.results[0].throughput
        for result in self.results:
            seconds = [result.mean_step_s(phase) or 0.0 for phase in self._phases()]
            table.add_row(
                result.name,
                f"{result.balancedness.mean():.4f}",
                f"{np.percentile(result.balancedness, LOW_PERCENTILE):.4f}",
                f"{_late(result):.4f}",
                *(f"{each * 1e3:.2f}" for each in seconds),
                f"{result.throughput:,.0f}",
                f"{result.throughput / first - 1:+.1%}",
            )
        return table

    def _moved_table(self) -> Table:
        table = right_aligned("cycles", "moved", "GB", "wait ms", "swap ms", "a plan here, s")
        for result in self.results:
            if result.planning_s:
                table.add_row(
                    result.name,
                    str(result.cycles),
                    str(result.experts_moved),
                    f"{result.bytes_moved / 1e9:.1f}",
                    f"{result.longest_wait_s * 1e3:.2f}",
                    f"{result.longest_swap_s * 1e3:.2f}",
                    f"{statistics.median(result.planning_s):.2g}",
                )
        return table

    def _result_dict(self, result: Result) -> dict[str, object]:
        initial = self.results[0]
        return {
            "name": result.name,
            "balancedness": float(result.balancedness.mean()),
            "balancedness_p5": float(np.percentile(result.balancedness, LOW_PERCENTILE)),
            "balancedness_late": _late(result),
            "step_s": result.mean_step_s(),
            "step_s_by_phase": {p.name.lower(): result.mean_step_s(p) for p in self._phases()},
            "tokens_per_s": result.throughput,
            "speedup": result.throughput / initial.throughput,
            "cycles": result.cycles,
            "failed_cycles": result.failed_cycles,
            "last_error": result.last_error,
            "commits": result.commits,
            "skipped_layers": result.skipped_layers,
            "experts_moved": result.experts_moved,
            "bytes_moved": result.bytes_moved,
            "wait_s": result.wait_s,
            "longest_wait_s": result.longest_wait_s,
            "swap_s": result.swap_s,
            "longest_swap_s": result.longest_swap_s,
        }


def run(request: Request, progress: Callable[[int, int], None]) -> Outcome:
    """Simulate, and draw the picture. Raises BadInput."""
    try:
        check_output(request.plot, [request.trace, *request.maps, Path(request.deployment.hardware)])
        if not math.isfinite(request.planning_time_s):
            raise BadInput(f"--planning-time {request.planning_time_s:g}: expected seconds")
        trace = read_trace(request.trace)
        steps = steps_of(trace, iterations(request.iter_range))
        setting = _setting(request, trace, len(steps))
        maps = _maps(request, trace, setting.topology)
        results = simulate(trace, setting, request.algorithms, steps=steps, deployed=maps, progress=progress)
        if request.plot is not None:
            from eplb_platform.offline.simulation_picture import draw

            draw(results, request.plot)
    except BadInput as error:
        raise bad_input("simulate", error) from error
    except ImportError as error:
        raise BadInput(f"simulate: --plot needs the extra [demo], which is not installed: {error}") from error
    except OSError as error:
        raise BadInput(f"simulate: {error.filename or request.plot}: {describe(error)}") from error
    except (RecordError, AlgorithmError, ValueError) as error:
        raise bad_input("simulate", error) from error
    return Outcome(request, setting, trace.num_logical_experts, trace.num_layers, len(steps), results)


def _setting(request: Request, trace: LoadTrace, num_steps: int) -> Setting:
    ep_size = request.deployment.ep_size or metadata_number(trace, "ep_size")
    if not ep_size:
        raise BadInput("give --ep-size: the record does not say it")
    profile = request.deployment.profile(trace)
    redundant = request.redundant_experts
    if redundant is None:
        redundant = fewest_redundant(trace.num_logical_experts, ep_size)
    slots = trace.num_logical_experts + redundant
    if slots % ep_size:
        raise BadInput(
            f"--redundant-experts {redundant}: {slots} slots, expected a multiple of {ep_size} ranks "
            f"(nearest: {redundant + -slots % ep_size})"
        )
    return Setting(
        topology=request.deployment.topology(ep_size, profile),
        num_redundant_experts=redundant,
        profile=profile,
        config=configuration(request.settings, num_steps),
        num_expert_groups=request.deployment.num_expert_groups,
        planning_s=request.planning_time_s,
    )


def _maps(request: Request, trace: LoadTrace, topology: Topology) -> Mapping[str, ExpertMap]:
    return {
        str(path): read_map(
            path,
            topology=topology,
            num_logical_experts=trace.num_logical_experts,
            num_layers=trace.num_layers,
        )
        for path in request.maps
    }


def _late(result: Result) -> float:
    """Balancedness of the later half of the judged steps."""
    return float(result.balancedness[len(result.balancedness) // 2 :].mean())
