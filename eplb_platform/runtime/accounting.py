"""What a cycle's report becomes: numbers, and lines in the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from eplb_platform.config import EplbConfig
from eplb_platform.runtime.cycle import CycleReport, Outcome, RankLink, Stage
from eplb_platform.runtime.ports import Tracer
from eplb_platform.runtime.stats import BalancerStats

if TYPE_CHECKING:
    from eplb_platform.migration.transfer import Migrator
    from eplb_platform.runtime.compute_profiling import ComputeProfiling

logger = logging.getLogger(__name__)


class CycleAccounts:
    """The cycles of one rank, added up in `stats`.

    model_name: for the log
    """

    def __init__(
        self,
        stats: BalancerStats,
        config: EplbConfig,
        link: RankLink,
        *,
        model_name: str,
        migrator: Migrator | None,
        tracer: Tracer | None,
        profiling: ComputeProfiling | None,
    ) -> None:
        self._stats = stats
        self._config = config
        self._link = link
        self._model_name = model_name
        self._migrator = migrator
        self._tracer = tracer
        self._profiling = profiling
        self._last_balancedness_line = 0
        self.last_end: float | None = None
        """When a cycle ended, by the rank's clock; None before the first, as `last_success`."""
        self.last_success: float | None = None

    def add(self, report: CycleReport, started_at: int) -> None:
        """A cycle has ended that was started at step `started_at`."""
        stats = self._stats
        self.last_end = self._link.clock.now()
        stats.moved_experts += report.moved_experts
        stats.skipped_layers += len(report.skipped_layers)
        stats.planning_s += report.seconds.get(Stage.PLAN, 0.0)
        stats.transfer_s += report.seconds.get(Stage.FETCH, 0.0)
        if self._migrator is not None:
            stats.bytes_received = self._migrator.bytes_received
        if report.outcome is Outcome.FAILED:
            stats.failed_cycles += 1
            stats.last_error = report.reason
        elif report.outcome is Outcome.CANCELLED:
            stats.cancelled_cycles += 1
        else:
            stats.cycles += 1
            stats.moved_cycles += report.outcome is Outcome.MOVED
            stats.stayed_cycles += report.outcome is Outcome.STAYED
            stats.no_load_cycles += report.outcome is Outcome.NO_LOAD
            stats.last_success_step = stats.steps
            self.last_success = self.last_end
        self._add_records(report)
        self._add_balancedness(report, started_at)
        self._add_compute_time(report)
        self._log(report)

    def add_profiling(self) -> None:
        """What has been measured until now."""
        stats, profiling = self._stats, self._profiling
        if profiling is None:
            return
        stats.profiled_passes = profiling.measured_passes
        stats.profiled_experts = profiling.measured_share
        stats.expert_compute_s = profiling.measured_ms / 1e3
        stats.profiling_s = profiling.profiler.overhead_ms / 1e3
        stats.compute_cost_residual = profiling.residual

    def add_failed_record(self, when: str, what: str, error: object) -> None:
        """A record was not written; that ends nothing."""
        self._stats.failed_records += 1
        self._stats.last_error = str(error)
        logger.warning("%s: the %s was not recorded: %s", when, what, error)

    def _add_records(self, report: CycleReport) -> None:
        if report.record_error:
            self.add_failed_record(f"cycle {report.number}", "expert map", report.record_error)
        elif Stage.RECORD in report.seconds:
            self._stats.records_written += 1
        if report.trace_error:
            self.add_failed_record(f"cycle {report.number}", "load trace", report.trace_error)
        if self._tracer is not None and self._link.plans:
            self._stats.trace_steps = self._tracer.num_steps

    def _add_balancedness(self, report: CycleReport, started_at: int) -> None:
        if report.balancedness is None:
            return
        self._stats.balancedness = float(report.balancedness.mean())
        self._stats.worst_layer_balancedness = float(report.balancedness.min())
        since_last = started_at - self._last_balancedness_line
        if self._config.log_balancedness and since_last >= self._config.log_balancedness_interval:
            self._last_balancedness_line = started_at
            self._log_balancedness(started_at, report)

    def _add_compute_time(self, report: CycleReport) -> None:
        if self._profiling is None:
            return
        if report.time_balancedness is not None:
            self._stats.time_balancedness = float(report.time_balancedness.mean())
        self.add_profiling()
        if report.cost_error:
            self.add_failed_record(f"cycle {report.number}", "compute cost", report.cost_error)

    def _log_balancedness(self, step: int, report: CycleReport) -> None:
        """What vLLM's line of that name says of a step, summed over layers, for a collection of steps."""
        if report.rank_load is None:
            return
        mean, hottest = (float(tokens.sum()) for tokens in report.rank_load)
        logger.info(
            "EPLB step %d, model %s: avg_tokens=%.2f, max_tokens=%.0f, balancedness=%.4f "
            "(mean over layers %.4f, worst layer %.4f) in this collection, steps to the end of the next: %d",
            step, self._model_name, mean, hottest, mean / hottest if hottest else 1.0,
            self._stats.balancedness, self._stats.worst_layer_balancedness,
            max(0, step + self._config.expert_heat_collection_interval - self._stats.steps),
        )  # fmt: skip

    def _log(self, report: CycleReport) -> None:
        """One line for each cycle from the rank that plans; failures from every rank that saw one."""
        if report.outcome is Outcome.FAILED:
            logger.warning(
                "cycle %d failed after %d commits, the map in force stays: %s",
                report.number, report.chunks_committed, report.reason,
            )  # fmt: skip
        elif self._link.plans:
            logger.info(
                "cycle %d: %s, %d experts in %d commits%s%s",
                report.number, report.outcome, report.moved_experts, report.chunks_committed,
                _gain(report), f" ({report.reason})" if report.reason else "",
            )  # fmt: skip
            self._log_compute_time()

    def _log_compute_time(self) -> None:
        stats = self._stats
        if self._profiling is None or not stats.expert_compute_s:
            return
        residual = stats.compute_cost_residual
        logger.info(
            "compute time of %.0f %% of the experts is known; measuring it took this rank %.3f s in %d "
            "passes, %.2f %% of the time that it measured%s",
            100 * stats.profiled_experts, stats.profiling_s, stats.profiled_passes,
            100 * stats.profiling_s / stats.expert_compute_s,
            "" if residual is None else f"; the fit leaves {100 * residual:.1f} % unexplained",
        )  # fmt: skip


def _gain(report: CycleReport) -> str:
    if report.balancedness is None or report.planned_balancedness is None:
        return ""
    gain = (
        f", balancedness {report.balancedness.mean():.3f} planned to {report.planned_balancedness.mean():.3f}"
    )
    now, planned = report.time_balancedness, report.planned_time_balancedness
    if now is None or planned is None:
        return gain
    return f"{gain}, of time {now.mean():.3f} planned to {planned.mean():.3f}"
