"""What balancers did, as Prometheus metrics.

A metric is one row of `METRICS`. Values come from snapshots alone and nothing is remembered between two
scrapes, so that any number of servers show the same. Counters count since the worker's start; each belongs to
one worker, so that a restart is the reset to zero that Prometheus knows, and is never hidden in a sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeAlias

from eplb_platform.runtime.cycle import Outcome, Stage
from eplb_platform.snapshot_files import ModelStatus, Snapshot

if TYPE_CHECKING:
    from prometheus_client.core import Metric as MetricFamily

PREFIX = "eplb_"
ALIVE_WITHIN_S = 10.0
"""A snapshot older than this, or a step that takes longer, is a sign of death."""
STATES = ("idle", "inactive", "paused", "closed", *Stage)
MODEL_LABELS = ("model", "pipeline_stage")

_Samples: TypeAlias = Mapping[tuple[str, ...], float | None]
"""Values by what the metric's own labels say; None for what is not known."""


class Kind(StrEnum):
    """The types of Prometheus metrics that are used."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True)
class Observation:
    """One model on one rank, looked at `age_s` seconds after its snapshot was taken."""

    model: str
    worker: Snapshot
    status: ModelStatus
    age_s: float

    @property
    def is_alive(self) -> bool:
        """An idle engine takes no steps: only a step that does not end tells of a stuck one."""
        return (
            self.age_s <= ALIVE_WITHIN_S
            and self.status.step_running_s <= ALIVE_WITHIN_S
            and self.status.state != "closed"
        )


@dataclass(frozen=True)
class Metric:
    """One metric: what it is called, and how its values are found in an observation."""

    name: str
    kind: Kind
    meaning: str
    samples: Callable[[Observation], _Samples]
    own_labels: tuple[str, ...] = ()
    """Labels beside those of the place; `samples` gives their values."""
    by_rank: bool = False
    """Shown for every rank; otherwise for each group, by the rank that plans."""

    @property
    def exported_name(self) -> str:
        """As it stands in a scrape."""
        return f"{PREFIX}{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The place, then the metric's own."""
        return MODEL_LABELS + (("rank",) if self.by_rank else ()) + self.own_labels

    def family(self, observations: Sequence[Observation]) -> MetricFamily:
        """The metric with its values."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        build = CounterMetricFamily if self.kind is Kind.COUNTER else GaugeMetricFamily
        family: MetricFamily = build(f"{PREFIX}{self.name}", self.meaning, labels=self.labels)
        planning = _planning_ranks(observations)
        for seen in observations:
            worker = seen.worker
            if not self.by_rank and worker.rank != planning[seen.model, worker.stage]:
                continue
            place = (seen.model, str(worker.stage), *([str(worker.rank)] if self.by_rank else []))
            for own, value in self.samples(seen).items():
                if value is not None:
                    family.add_metric((*place, *own), value)  # type: ignore[attr-defined]
        return family


def _planning_ranks(observations: Sequence[Observation]) -> dict[tuple[str, int], int]:
    """The rank that plans for each model and stage: the lowest that is active, or the lowest of all."""
    ranks: dict[tuple[str, int], tuple[bool, int]] = {}
    for seen in observations:
        place = seen.model, seen.worker.stage
        found = seen.status.state == "inactive", seen.worker.rank
        ranks[place] = min(ranks.get(place, found), found)
    return {place: rank for place, (_, rank) in ranks.items()}


def _field(name: str) -> Callable[[Observation], _Samples]:
    return lambda seen: {(): getattr(seen.status, name)}


def _aged(name: str) -> Callable[[Observation], _Samples]:
    """An age when the snapshot was taken, as it is now."""

    def samples(seen: Observation) -> _Samples:
        age: float | None = getattr(seen.status, name)
        return {(): None if age is None else max(0.0, age) + seen.age_s}

    return samples


def _cycles(seen: Observation) -> _Samples:
    status = seen.status
    counts = {
        Outcome.MOVED: status.moved_cycles,
        Outcome.STAYED: status.stayed_cycles,
        Outcome.NO_LOAD: status.no_load_cycles,
        Outcome.CANCELLED: status.cancelled_cycles,
        Outcome.FAILED: status.failed_cycles,
    }
    return {(outcome.replace(" ", "_"),): count for outcome, count in counts.items()}


def _info(seen: Observation) -> _Samples:
    return {(_version(), seen.status.algorithm, str(seen.worker.ep_size)): 1}


@cache
def _version() -> str:
    try:
        return version("eplb_platform")
    except PackageNotFoundError:
        return "unknown"


METRICS = (
    Metric(
        "info", Kind.GAUGE, "1; the labels say what balances the model.", _info,
        own_labels=("version", "algorithm", "ep_size"),
    ),
    Metric(
        "load_balance_ratio", Kind.GAUGE,
        "Mean rank load / maximum rank load in the last collected load, mean over layers; 1 is perfect.",
        _field("balancedness"),
    ),
    Metric(
        "worst_layer_load_balance_ratio", Kind.GAUGE, "The same of the layer where it is lowest.",
        _field("worst_layer_balancedness"),
    ),
    Metric(
        "time_balance_ratio", Kind.GAUGE,
        "Mean rank compute time / maximum, of the last collected load by measured cost; absent without.",
        _field("time_balancedness"),
    ),
    Metric(
        "profiled_experts_ratio", Kind.GAUGE, "The part of the experts whose compute cost is known.",
        _field("profiled_experts"),
    ),
    Metric("cycles", Kind.COUNTER, "Balancing cycles, by how they ended.", _cycles, own_labels=("outcome",)),
    Metric("commits", Kind.COUNTER, "Chunks of layers committed.", _field("commits")),
    Metric(
        "moved_experts", Kind.COUNTER, "Experts that a rank had to receive, summed over layers and ranks.",
        _field("moved_experts"),
    ),
    Metric(
        "planning_seconds", Kind.COUNTER, "Seconds spent planning, in the background.",
        _field("planning_s"),
    ),
    Metric(
        "map_age_seconds", Kind.GAUGE, "Seconds since the map in force was committed, or since the start.",
        _aged("map_age_s"),
    ),
    Metric(
        "last_cycle_age_seconds", Kind.GAUGE, "Seconds since a cycle ended, however it did; absent before.",
        _aged("last_cycle_age_s"),
    ),
    Metric(
        "last_success_age_seconds", Kind.GAUGE, "Seconds since a cycle ended well; absent before.",
        _aged("last_success_age_s"),
    ),
    Metric(
        "next_cycle_steps", Kind.GAUGE, "Forward passes until the next cycle; absent where none will come.",
        _field("next_cycle_steps"),
    ),
    Metric(
        "state", Kind.GAUGE, "1 for the state that the balancer is in, 0 for the others.",
        lambda seen: {(str(state),): state == seen.status.state for state in STATES}, own_labels=("state",),
    ),
    Metric(
        "records", Kind.COUNTER, "Expert maps recorded, by result.",
        lambda seen: {("written",): seen.status.records_written, ("failed",): seen.status.failed_records},
        own_labels=("result",),
    ),
    Metric(
        "trace_steps", Kind.COUNTER, "Steps in the load trace; absent without one.", _field("trace_steps"),
    ),
    Metric(
        "alive", Kind.GAUGE,
        f"1 while the rank is heard of and no step is stuck, both within {ALIVE_WITHIN_S:g} s; 0 otherwise.",
        lambda seen: {(): seen.is_alive}, by_rank=True,
    ),
    Metric(
        "snapshot_age_seconds", Kind.GAUGE, "Seconds since the rank was last heard of.",
        lambda seen: {(): seen.age_s}, by_rank=True,
    ),
    Metric(
        "stage_running_seconds", Kind.GAUGE, "Seconds since the cycle entered its stage; 0 when idle.",
        _field("stage_running_s"), by_rank=True,
    ),
    Metric(
        "waiting_for_rank", Kind.GAUGE, "1 for each rank that this one has waited for longer than a second.",
        lambda seen: {(str(rank),): 1 for rank in seen.status.waits_for},
        own_labels=("missing_rank",), by_rank=True,
    ),
    Metric(
        "stalls", Kind.COUNTER, "Reports that a stage did not get on within the transfer time-out.",
        _field("stalls"), by_rank=True,
    ),
    Metric("steps", Kind.COUNTER, "Forward passes, dummy passes included.", _field("steps"), by_rank=True),
    Metric(
        "received_bytes", Kind.COUNTER, "Bytes of expert weights received from other ranks.",
        _field("bytes_received"), by_rank=True,
    ),
    Metric(
        "transfer_seconds", Kind.COUNTER, "Seconds spent transferring weights, in the background.",
        _field("transfer_s"), by_rank=True,
    ),
    Metric(
        "wait_seconds", Kind.COUNTER, "Seconds that the forward thread waited for the decision on a commit.",
        _field("wait_s"), by_rank=True,
    ),
    Metric(
        "longest_wait_seconds", Kind.GAUGE, "The longest such wait since the start.",
        _field("longest_wait_s"), by_rank=True,
    ),
    Metric(
        "stall_seconds", Kind.COUNTER, "Seconds that balancing took from the forward thread, waits included.",
        _field("stall_s"), by_rank=True,
    ),
    Metric(
        "profiled_passes", Kind.COUNTER, "Forward passes in which experts were timed.",
        _field("profiled_passes"), by_rank=True,
    ),
    Metric(
        "expert_compute_seconds", Kind.COUNTER, "Seconds that experts took in those passes.",
        _field("expert_compute_s"), by_rank=True,
    ),
    Metric(
        "profiling_seconds", Kind.COUNTER, "Processor seconds that timing them took on the forward thread.",
        _field("profiling_s"), by_rank=True,
    ),
    Metric(
        "compute_cost_residual", Kind.GAUGE,
        "Part of grouped kernels' time that the fitted costs do not explain; absent where experts run apart.",
        _field("compute_cost_residual"), by_rank=True,
    ),
    Metric(
        "staging_bytes", Kind.GAUGE, "Memory allocated for weights in flight.", _field("staging_bytes"),
        by_rank=True,
    ),
)  # fmt: skip
"""Everything that is exported, in the order of a scrape."""


class SnapshotCollector:
    """A Prometheus collector: `registry.register(SnapshotCollector(...))`.

    snapshots: read at every scrape.
    now: seconds since the epoch, to tell how old a snapshot is.
    """

    def __init__(
        self, snapshots: Callable[[], Iterable[Snapshot]], now: Callable[[], float] = time.time
    ) -> None:
        self._snapshots = snapshots
        self._now = now

    def describe(self) -> list[MetricFamily]:
        """The families without values: registering reads no snapshot."""
        return [metric.family(()) for metric in METRICS]

    def collect(self) -> list[MetricFamily]:
        """The families with the values of now."""
        seen = observe(self._snapshots(), self._now())
        return [metric.family(seen) for metric in METRICS]


def observe(snapshots: Iterable[Snapshot], now: float) -> list[Observation]:
    """One observation for each model and rank: the latest, should a worker have followed another."""
    latest: dict[tuple[str, int, int], Observation] = {}
    for worker in sorted(snapshots, key=lambda snapshot: snapshot.updated):
        for model, status in worker.models.items():
            age_s = max(0.0, now - worker.updated)
            latest[model, worker.stage, worker.rank] = Observation(model, worker, status, age_s)
    return [latest[key] for key in sorted(latest)]
