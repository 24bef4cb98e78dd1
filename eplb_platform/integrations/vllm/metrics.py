"""Balancing on vLLM's own /metrics.

Workers are other processes than the API servers, and without Prometheus' multi-process mode, which vLLM uses
for several API servers only, nothing that they count would be seen. So workers publish snapshots in a folder
that the front end makes, and a collector in every API server reads them.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eplb_platform.snapshot_files import SnapshotPublisher, read_snapshots

if TYPE_CHECKING:
    from eplb_platform.telemetry import SnapshotCollector

__all__ = ["STATE_DIR_VARIABLE", "SnapshotPublisher", "prepare_front_end", "state_folder"]

logger = logging.getLogger(__name__)

STATE_DIR_VARIABLE = "EPLB_PLATFORM_STATE_DIR"
ABANDONED_AFTER_S = 3600.0
"""A process that is not to be seen may live in another container with the same temporary folder; then it
writes every second.
"""
_FOLDER = re.compile(r"eplb-platform-(\d+)-\w+")
_is_served = False


def state_folder() -> Path | None:
    """Where this engine's workers publish; None where no front end was prepared."""
    folder = os.environ.get(STATE_DIR_VARIABLE)
    return Path(folder) if folder else None


def prepare_front_end() -> None:
    """Make the folder for the workers that this front end starts, and serve what they publish. Idempotent."""
    folder = state_folder()
    if folder is None or not _is_ours(folder):
        _remove_abandoned()
        folder = Path(tempfile.mkdtemp(prefix=f"eplb-platform-{os.getpid()}-"))
        os.environ[STATE_DIR_VARIABLE] = str(folder)
        atexit.register(_remove, folder, os.getpid())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _serve()


def _is_ours(folder: Path) -> bool:
    """Whether the folder is this front end's or was chosen by the user; an environment that another engine's
    front end left behind is neither.
    """
    made = _FOLDER.fullmatch(folder.name)
    # vLLM starts its further API servers through multiprocessing; nobody starts a second engine that way.
    is_part_of_a_front_end = multiprocessing.parent_process() is not None
    return made is None or is_part_of_a_front_end or int(made[1]) == os.getpid()


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned() -> None:
    """Folders of front ends that were killed."""
    for folder in Path(tempfile.gettempdir()).glob("eplb-platform-*"):
        made = _FOLDER.fullmatch(folder.name)
        with suppress(OSError):
            status = folder.lstat()
            is_old = time.time() - status.st_mtime > ABANDONED_AFTER_S
            if made and status.st_uid == os.getuid() and is_old and not Path(f"/proc/{made[1]}").exists():
                shutil.rmtree(folder, ignore_errors=True)


# --- serving ---


def _serve() -> None:
    """Register the collector wherever this process's /metrics may come from."""
    global _is_served
    if _is_served:
        return
    _is_served = True
    from prometheus_client import REGISTRY

    from eplb_platform.telemetry import SnapshotCollector

    collector = SnapshotCollector(lambda: read_snapshots(folder) if (folder := state_folder()) else ())
    REGISTRY.register(collector)
    _serve_with_several_processes(collector)


def _serve_with_several_processes(collector: SnapshotCollector) -> None:
    """In multi-process mode a scrape gets a registry of its own, with nothing but the collector that merges
    the files of all processes: ours goes wherever that one goes.
    """
    from prometheus_client import multiprocess

    merging: Any = getattr(multiprocess, "MultiProcessCollector", None)
    if merging is None:
        logger.warning("prometheus_client has no MultiProcessCollector: no metrics with several API servers")
        return
    initialise = merging.__init__

    @functools.wraps(initialise)
    def __init__(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, registry, *args, **kwargs)
        if registry:
            with suppress(ValueError):  # it has ours already
                registry.register(collector)

    merging.__init__ = __init__
