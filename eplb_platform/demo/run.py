"""The demo's four phases, one after the other, each served by new processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eplb_platform.demo.measures import PhaseLoad, total_load
from eplb_platform.demo.messages import Orders, Progress, RankResult
from eplb_platform.demo.processes import RankFailed, Ranks
from eplb_platform.demo.schedule import Schedule, Text, plan_serving
from eplb_platform.demo.settings import CheckedSettings

PHASES = ("contiguous", "dynamic", "record", "static")


class Observer(Protocol):
    """Whom the demo tells how far it is."""

    def begin(self, phase: str) -> None: ...

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


@dataclass(frozen=True)
class DemoResult:
    """All phases, and the verdict over them."""

    settings: CheckedSettings
    schedule: Schedule
    phases: Mapping[str, PhaseResult]

    @property
    def different_tokens(self) -> list[str]:
        """Phases that generated other tokens than the first one."""
        first = self.phases[PHASES[0]].tokens
        return [name for name, phase in self.phases.items() if not _same(first, phase.tokens)]

    @property
    def faults(self) -> list[str]:
        """What balancing got wrong, in words; empty when it kept its promises."""
        first = self.phases[PHASES[0]].load.mean_from(0)
        faults = [
            f"phase {name} generated other tokens than phase {PHASES[0]}" for name in self.different_tokens
        ]
        for name in ("dynamic", "static"):
            balancedness = self.phases[name].load.mean_from(self.phases[name].first_commit)
            if balancedness <= first:
                faults.append(
                    f"phase {name} did not raise balancedness: {balancedness:.3f}, without {first:.3f}"
                )
        return faults


def run_demo(settings: CheckedSettings, observer: Observer) -> DemoResult:
    """Serve all phases. Raises `RankFailed` when a rank ends early; nothing is left running then either."""
    options = settings.options
    texts = [Text(path.stem, np.frombuffer(path.read_bytes(), dtype=np.uint8)) for path in options.texts]
    schedule = plan_serving(
        texts, ranks=options.ranks, steps=options.steps, serving=options.serving, seed=options.seed
    )
    phases: dict[str, PhaseResult] = {}
    for name in PHASES:
        observer.begin(name)
        try:
            phases[name] = _serve(name, settings, schedule, observer)
            if name == "record":
                _require_record(phases[name])
        except RankFailed as failure:
            raise RankFailed(f"phase {name}: {failure}") from failure
        observer.end(name)
    return DemoResult(settings, schedule, phases)


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
    config["dynamic_eplb"] = phase == "dynamic"
    config["expert_heat_collection_interval"] = options.heat_interval
    config["algorithm_execution_interval"] = options.plan_interval
    if phase == "record":
        config["expert_map_record_path"] = str(options.expert_map_record_path)
    return {"eplb_config": config}


def _serve(name: str, settings: CheckedSettings, schedule: Schedule, observer: Observer) -> PhaseResult:
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
    )


def _require_record(recorded: PhaseResult) -> None:
    """Without this a map that an earlier run left would be served as the recorded one."""
    if not recorded.maps_written:
        raise RankFailed(f"rank 0: no map was written: {recorded.last_error or 'no cycle was completed'}")


def _same(first: tuple[NDArray[np.uint8], ...], other: tuple[NDArray[np.uint8], ...]) -> bool:
    return len(first) == len(other) and all(map(np.array_equal, first, other))
