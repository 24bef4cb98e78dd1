"""What a balancer did so far, as numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class BalancerStats:
    """Counters of one rank since its start; moved experts and commits are the same on every rank.

    A stall is time that `Balancer.step` took from the forward thread; a wait is the part of it spent waiting
    for the decision on a commit. `cycles` are those that ended well: that moved experts, that left the
    map as it was, and that found no load.
    """

    steps: int = 0
    dummy_steps: int = 0
    cycles: int = 0
    moved_cycles: int = 0
    stayed_cycles: int = 0
    no_load_cycles: int = 0
    failed_cycles: int = 0
    cancelled_cycles: int = 0
    commits: int = 0
    invalidations: int = 0
    resizes: int = 0
    stalls: int = 0
    """Reports of the watchdog."""
    moved_experts: int = 0
    skipped_layers: int = 0
    bytes_received: int = 0
    staging_bytes: int = 0
    longest_wait_s: float = 0.0
    wait_s: float = 0.0
    longest_stall_s: float = 0.0
    stall_s: float = 0.0
    planning_s: float = 0.0
    transfer_s: float = 0.0
    records_written: int = 0
    failed_records: int = 0
    trace_steps: int | None = None
    """Steps in the load trace; None where none is recorded."""
    first_commit_step: int | None = None
    last_success_step: int | None = None
    balancedness: float | None = None
    """Mean over layers in the last collected load, before what the cycle moved; on the rank that plans."""
    worst_layer_balancedness: float | None = None
    time_balancedness: float | None = None
    """The same of the time that experts take by their measured cost; None where that is not measured."""
    profiled_passes: int = 0
    """Passes in which this rank timed its experts."""
    profiled_experts: float = 0.0
    """The part of all experts whose cost some rank has measured."""
    expert_compute_s: float = 0.0
    """What this rank's experts took in those passes."""
    profiling_s: float = 0.0
    """Processor time that timing them took on the forward thread."""
    compute_cost_residual: float | None = None
    """Of grouped kernels: the part of the time that the fitted costs leave unexplained; else None."""
    last_error: str = ""

    def as_dict(self) -> dict[str, int | float | str | None]:
        """For JSON."""
        return asdict(self)
