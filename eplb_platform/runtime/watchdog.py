"""A balancer that does not get on is reported, with where it is and for whom it waits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger(__name__)

LOOKS_PER_LIMIT = 4
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Waiting:
    """Where a cycle waits for other ranks.

    place: as in the keys of the store, like `cycle/7/chunk/0/ready`
    missing: the ranks that have not come there, when last looked
    """

    place: str
    missing: Sequence[int]


@dataclass(frozen=True)
class Progress:
    """What a rank does, and since when."""

    what: str
    """The stage of the running cycle, or the forward thread's call; another text means that it got on."""
    since_s: float
    """Seconds."""
    waiting: Waiting | None = None


class Watched(Protocol):
    """What the watchdog looks at, from a thread of its own."""

    def progress(self) -> Progress | None:
        """None where nothing needs to get on: idle, or waiting for an engine that makes no passes."""
        ...

    def report_stall(self, line: str) -> None:
        """It has not got on for too long, and here is what to say."""
        ...


class StallReports:
    """When to speak: once at the limit, then whenever the time has doubled, until it gets on."""

    def __init__(self, rank: int, limit_s: float) -> None:
        self._rank = rank
        self._limit_s = limit_s
        self._what = ""
        self._next_s = limit_s

    def look(self, progress: Progress | None) -> str | None:
        """The line to report now, if any."""
        if progress is None or progress.what != self._what or progress.since_s < self._limit_s:
            self._what, self._next_s = "" if progress is None else progress.what, self._limit_s
        if progress is None or progress.since_s < self._next_s:
            return None
        while self._next_s <= progress.since_s:
            self._next_s *= 2
        return (
            f"rank {self._rank}: {progress.what} has not got on for {progress.since_s:.0f} s{_why(progress)}"
        )


def _why(progress: Progress) -> str:
    waiting = progress.waiting
    if waiting is None:
        return ""
    missing = ", ".join(map(str, waiting.missing))
    return (
        f": it waits for rank {missing} at {waiting.place}" if missing else f": it waits at {waiting.place}"
    )


class Watchdog:
    """Looks at a balancer from a daemon thread, several times within `limit_s` seconds."""

    def __init__(self, watched: Watched, rank: int, limit_s: float, name: str) -> None:
        self._watched = watched
        self._reports = StallReports(rank, limit_s)
        self._interval_s = limit_s / LOOKS_PER_LIMIT
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> Callable[[], None]:
        """Look from now on; returns what ends it."""
        self._thread.start()
        return self.close

    def close(self) -> None:
        """Look no more. Idempotent."""
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        while not self._closing.wait(self._interval_s):
            try:
                line = self._reports.look(self._watched.progress())
                if line is not None:
                    self._watched.report_stall(line)
            except Exception:
                logger.exception("the watchdog failed")
