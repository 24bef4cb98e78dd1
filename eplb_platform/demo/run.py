"""The demo's phases, one after the other, each served by new processes.

Four serve the model as it is. Two more serve the beginning of the same with experts of unequal cost, balanced
by tokens and by time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eplb_platform.balance import balancedness
from eplb_platform.demo.measures import PhaseLoad, total_load
from eplb_platform.demo.messages import Orders, Progress, RankResult
from eplb_platform.demo.processes import RankFailed, Ranks
from eplb_platform.demo.schedule import Batch, Schedule, Text, plan_serving
from eplb_platform.demo.settings import CheckedSettings

PHASES = ("contiguous", "dynamic", "record", "static")
UNEQUAL_PHASES = ("by tokens", "by time")
JUDGED_PASSES = 200
COSTLY_ONE_IN = 8
COSTLY_REPEATS = 8
"""One expert in so many does its work so many times."""


class Observer(Protocol):
    """Whom the demo tells how far it is."""

    def begin(self, phase: str, steps: int) -> None: ...

    def update(self, phase: str, rank: int, progress: Progress) -> None: ...

    def end(self, phase: str) -> None: ...


@dataclass(frozen=True)
class PhaseResult:
    """What was measured in a phase, over all ranks."""

    name: str
    load: PhaseLoad
    tokens: tuple[NDArray[np.uint8], ...]
    """One array for each rank: what it generated, batch after batch."""
    forward_ms: NDArray[np.float64]
    """[forwards], of the slowest rank."""
    first_commit: int
    """The first forward pass that a commit had changed; 0 when nothing moved."""
    moved_experts: int
    cycles: int
    failed_cycles: int
    maps_written: int
    last_error: str
    stall_ms_max: float
    """Longest time that the balancer took from the forward thread of any rank."""
    time_balancedness: tuple[float, float] | None = None
    """Of the time that experts took, before the first commit and from it on, mean over layers."""
    profiling_share: float = 0.0
    """Of the forward passes' time, what timing the experts took on the rank where it was most."""


@dataclass(frozen=True)
class DemoResult:
    """All phases, and the verdict over them."""

    settings: CheckedSettings
    schedule: Schedule
    phases: Mapping[str, PhaseResult]
    unequal: Mapping[str, PhaseResult] = field(default_factory=dict)

    @property
    def different_tokens(self) -> list[str]:
        """Phases that generated other tokens than the first one."""
        first = self.phases[PHASES[0]].tokens
        changed = [name for name, phase in self.phases.items() if not _same(first, phase.tokens)]
        changed += [name for name, phase in self.unequal.items() if not _begins_with(first, phase.tokens)]
        return changed

    @property
    def faults(self) -> list[str]:
        """What balancing got wrong, in words; empty when it kept its promises."""
        first = self.phases[PHASES[0]].load.mean_from(0)
        faults = [
            f"phase {name} generated other tokens than phase {PHASES[0]}" for name in self.different_tokens
        ]
        for name in ("dynamic", "static"):
            reached = self.phases[name].load.mean_from(self.phases[name].first_commit)
            if reached <= first:
                faults.append(f"phase {name} did not raise balancedness: {reached:.3f}, without {first:.3f}")
        return faults + self._unequal_faults()

    def _unequal_faults(self) -> list[str]:
        """By time, time must be better balanced than by tokens; over few passes chance would decide."""
        if any(len(phase.forward_ms) < JUDGED_PASSES for phase in self.unequal.values()):
            return []
        by_tokens, by_time = (
            phase.time_balancedness[1]
            if (phase := self.unequal.get(name)) and phase.time_balancedness
            else 0.0
            for name in UNEQUAL_PHASES
        )
        if not self.unequal or by_time > by_tokens:
            return []
        return [f"balancing by time did not raise its balancedness: {by_time:.3f}, by tokens {by_tokens:.3f}"]


def run_demo(settings: CheckedSettings, observer: Observer) -> DemoResult:
    """Serve all phases. Raises `RankFailed` when a rank ends early; nothing is left running then either."""
    options = settings.options
    texts = [Text(path.stem, np.frombuffer(path.read_bytes(), dtype=np.uint8)) for path in options.texts]
    schedule = plan_serving(
        texts, ranks=options.ranks, steps=options.steps, serving=options.serving, seed=options.seed
    )
    phases: dict[str, PhaseResult] = {}
    part = beginning(schedule, settings)
    repeats = costly_experts(settings)
    for name in (*PHASES, *UNEQUAL_PHASES):
        served = schedule if name in PHASES else part
        observer.begin(name, served.steps)
        try:
            phases[name] = _serve(name, settings, served, observer, None if name in PHASES else repeats)
            if name == "record":
                _require_record(phases[name])
        except RankFailed as failure:
            raise RankFailed(f"phase {name}: {failure}") from failure
        observer.end(name)
    unequal = {name: phases.pop(name) for name in UNEQUAL_PHASES}
    return DemoResult(settings, schedule, phases, unequal)


def beginning(schedule: Schedule, settings: CheckedSettings) -> Schedule:
    """The first batches, at least half of the passes and enough for three cycles where there are so many."""
    options, batches, steps = settings.options, list[Batch](), 0
    wanted = max(schedule.steps // 2, 3 * (options.heat_interval + options.plan_interval))
    for batch in schedule.batches:
        if steps >= wanted:
            break
        batches.append(batch)
        steps += batch.forwards
    return Schedule(schedule.stretches, tuple(batches), steps)


def costly_experts(settings: CheckedSettings) -> NDArray[np.int64]:
    """[layers, logical], how often each expert computes; the seed draws where the costly ones begin."""
    draw = np.random.default_rng(settings.options.seed)
    layers, experts = settings.shape.num_layers, settings.shape.num_logical_experts
    repeats = np.ones((layers, experts), dtype=np.int64)
    costly = np.arange(max(1, experts // COSTLY_ONE_IN))
    for layer in range(layers):
        repeats[layer, (draw.integers(experts) + costly) % experts] = COSTLY_REPEATS
    return repeats


def log_path(settings: CheckedSettings) -> Path:
    """Where the ranks' own output goes."""
    return settings.options.picture.with_suffix(".log")


def eplb_config(phase: str, settings: CheckedSettings) -> dict[str, object] | None:
    """The configuration of a phase, as an engine would be given it; None for no balancer."""
    options = settings.options
    if phase == "contiguous":
        return None
    config: dict[str, object] = {"backend": options.backend}
    if phase == "static":
        config["expert_map_path"] = str(options.expert_map_path or options.expert_map_record_path)
        return {"eplb_config": config}
    config["num_redundant_experts"] = settings.redundant_experts
    config["dynamic_eplb"] = phase in ("dynamic", *UNEQUAL_PHASES)
    if phase in UNEQUAL_PHASES:
        config["enable_expert_compute_profiling"] = True
        config["compute_cost_alpha"] = 1.0 if phase == "by time" else 0.0
    config["expert_heat_collection_interval"] = options.heat_interval
    config["algorithm_execution_interval"] = options.plan_interval
    if phase == "record":
        config["expert_map_record_path"] = str(options.expert_map_record_path)
    return {"eplb_config": config}


def _serve(
    name: str,
    settings: CheckedSettings,
    schedule: Schedule,
    observer: Observer,
    repeats: NDArray[np.int64] | None,
) -> PhaseResult:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    options = settings.options
    orders = [
        Orders(
            rank=rank,
            num_ranks=options.ranks,
            store_port=store.port,
            model=options.model,
            num_logical_experts=settings.shape.num_logical_experts,
            redundant_experts=settings.redundant_experts,
            backend=options.backend,
            eplb_config=eplb_config(name, settings),
            batches=schedule.of_rank(rank),
            log=log_path(settings),
            repeats=repeats,
        )
        for rank in range(options.ranks)
    ]
    with Ranks(orders) as ranks:
        results = ranks.results(lambda rank, progress: observer.update(name, rank, progress))
    return summarise(name, results)


def summarise(name: str, results: list[RankResult]) -> PhaseResult:
    """Put the ranks' results of a phase together."""
    stats = [result.stats for result in results if result.stats is not None]
    first = stats[0] if stats else None
    return PhaseResult(
        name=name,
        load=total_load([result.load for result in results]),
        tokens=tuple(np.concatenate([batch.ravel() for batch in result.tokens]) for result in results),
        forward_ms=np.max([result.forward_ms for result in results], axis=0),
        first_commit=(first.first_commit_step or 0) if first else 0,
        moved_experts=first.moved_experts if first else 0,
        cycles=first.cycles if first else 0,
        failed_cycles=max((s.failed_cycles for s in stats), default=0),
        maps_written=max((s.records_written for s in stats), default=0),
        last_error=next((s.last_error for s in stats if s.last_error), ""),
        stall_ms_max=1e3 * max((s.longest_stall_s for s in stats), default=0.0),
        time_balancedness=_time_balancedness(results),
        profiling_share=max((_profiling_share(result) for result in results), default=0.0),
    )


def _time_balancedness(results: list[RankResult]) -> tuple[float, float] | None:
    """Before the first commit and from it on; None where a rank timed nothing."""
    times = [result.expert_ms for result in results if result.expert_ms is not None]
    if not times or len(times) < len(results):
        return None
    before, after = balancedness(np.stack(times, axis=-1)).mean(axis=-1)
    return float(before), float(after)


def _profiling_share(result: RankResult) -> float:
    return 0.0 if result.stats is None else 1e3 * result.stats.profiling_s / float(result.forward_ms.sum())


def _require_record(recorded: PhaseResult) -> None:
    """Without this a map that an earlier run left would be served as the recorded one."""
    if not recorded.maps_written:
        raise RankFailed(f"rank 0: no map was written: {recorded.last_error or 'no cycle was completed'}")


def _begins_with(first: tuple[NDArray[np.uint8], ...], other: tuple[NDArray[np.uint8], ...]) -> bool:
    return _same(tuple(tokens[: len(part)] for tokens, part in zip(first, other, strict=True)), other)


def _same(first: tuple[NDArray[np.uint8], ...], other: tuple[NDArray[np.uint8], ...]) -> bool:
    return len(first) == len(other) and all(map(np.array_equal, first, other))
