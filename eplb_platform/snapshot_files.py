"""Snapshots of balancers as small files: how the workers of an engine tell its front end what they do.

Each worker has one file in a folder that all share, and replaces it whole every second. Readers need no
connection to a worker, see the last word of one that died, and may be many.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eplb_platform.records.atomic import write_atomically

logger = logging.getLogger(__name__)

SUFFIX = ".json"
MAX_BYTES = 1 << 20
CLOSE_TIMEOUT_S = 5.0

_Count: TypeAlias = Annotated[int, Field(ge=0)]
_Seconds: TypeAlias = Annotated[float, Field(ge=0)]
_Ratio: TypeAlias = Annotated[float, Field(ge=0, le=1)]
_Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024)]


class _Validated(BaseModel):
    """Immutable and strict; keys that nobody here reads are dropped."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class ModelStatus(_Validated):
    """One model on one rank: the fields of `Balancer.status()` that are shown."""

    state: _Name
    algorithm: _Name
    map_age_s: float
    last_cycle_age_s: float | None
    last_success_age_s: float | None
    next_cycle_steps: _Count | None
    step_running_s: float
    stage_running_s: float
    waits_at: Annotated[str, Field(max_length=1024)]
    waits_for: Annotated[list[_Count], Field(max_length=64)]
    stalls: _Count
    steps: _Count
    moved_cycles: _Count
    stayed_cycles: _Count
    no_load_cycles: _Count
    cancelled_cycles: _Count
    failed_cycles: _Count
    commits: _Count
    moved_experts: _Count
    bytes_received: _Count
    staging_bytes: _Count
    planning_s: _Seconds
    transfer_s: _Seconds
    wait_s: _Seconds
    longest_wait_s: _Seconds
    stall_s: _Seconds
    records_written: _Count
    failed_records: _Count
    trace_steps: _Count | None
    balancedness: _Ratio | None
    worst_layer_balancedness: _Ratio | None
    time_balancedness: _Ratio | None
    profiled_passes: _Count
    profiled_experts: _Ratio
    expert_compute_s: _Seconds
    profiling_s: _Seconds
    compute_cost_residual: _Seconds | None


class Snapshot(_Validated):
    """One worker: its rank in its expert-parallel group of `ep_size`, its models, and when that was true.

    stage: the pipeline stage, each of which has a group of its own.
    updated: seconds since the epoch.
    """

    rank: _Count
    ep_size: Annotated[int, Field(ge=1)]
    stage: _Count = 0
    updated: _Seconds
    models: dict[_Name, ModelStatus]


class SnapshotPublisher:
    """Keeps `<folder>/<name>.json` up to date from a daemon thread.

    snapshot: called in that thread; gives the fields of `Snapshot` as plain data, `updated` excepted.

    What goes wrong is logged once and never raised: serving goes on, and the file's age tells. The folder is
    its owner's: once it is gone nothing is written any more.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        snapshot: Callable[[], Mapping[str, object]],
        interval_s: float = 1.0,
    ) -> None:
        self._folder = folder
        self._path = folder / f"{name}{SUFFIX}"
        self._snapshot = snapshot
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="eplb-snapshots", daemon=True)
        self._is_failing = False

    def start(self) -> None:
        """Publish from now on; once."""
        self._thread.start()

    def close(self) -> None:
        """Stop and take the file away: a worker that was told to end is not a dead one. Idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s stays: %s", self._path, error)

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                self._publish()
                self._is_failing = False
            except Exception as error:
                if not self._is_failing:
                    logger.warning("no metrics in %s: %s: %s", self._path, type(error).__name__, error)
                self._is_failing = True
            self._closing.wait(self._interval_s)

    def _publish(self) -> None:
        if self._folder.is_dir():
            snapshot = Snapshot.model_validate({**self._snapshot(), "updated": time.time()})
            write_atomically(self._path, snapshot.model_dump_json().encode(), durable=False)


def read_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in `folder`, in the order of their files' names; none when it is missing.

    Files that are no snapshots, or incomplete, are passed over.
    """
    read = (read_snapshot(path) for path in sorted(folder.glob(f"*{SUFFIX}")))
    return [snapshot for snapshot in read if snapshot is not None]


def read_snapshot(path: Path) -> Snapshot | None:
    """The snapshot in one file; None where it is none."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        return Snapshot.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        logger.debug("%s is passed over: %s", path, error)
        return None
