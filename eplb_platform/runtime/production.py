"""The ports as they are in real processes: blocking calls in one background thread for each rank."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_platform.migration.schedule import Chunk
from eplb_platform.runtime.ports import Background, Clock, Group, run_blocking

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eplb_platform.backend import Backend
    from eplb_platform.migration.transfer import Migrator

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0


class ThreadClock(Clock):
    """Real time; `until` sleeps on the gate's condition, so that nothing is polled."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        deadline = None if timeout_s is None else self.now() + timeout_s
        with self._changed:
            while not condition():
                left = LOOK_AGAIN_S if deadline is None else min(LOOK_AGAIN_S, deadline - self.now())
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True


class BackendGroup(Group):
    """The backend's group and the migrator that uses it.

    ranks: who is in the backend's group now
    timeout_s: for what a device has still to copy once an exchange has returned
    """

    def __init__(
        self, backend: Backend, migrator: Migrator | None, timeout_s: float, ranks: Sequence[int]
    ) -> None:
        self._backend = backend
        self._migrator = migrator
        self._timeout_s = timeout_s
        self._ranks = tuple(ranks)

    @contextmanager
    def lent(self, migrator: Migrator) -> Iterator[Migrator]:
        """Let `fetch` use `migrator` for a while, where there is no other."""
        self._migrator = migrator
        try:
            yield migrator
        finally:
            self._migrator = None

    async def rebuild(self, epoch: int, ranks: Sequence[int]) -> None:
        if tuple(ranks) == self._ranks:
            self._backend.rebuild(epoch)
        else:
            self._backend.regroup(epoch, ranks)
            self._ranks = tuple(ranks)

    async def sum(self, load: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._backend.sum_on_host(load)

    async def broadcast(self, values: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        return self._backend.broadcast_on_host(values, source)

    async def fetch(self, chunk: Chunk) -> None:
        self._moving().fetch(chunk)
        self._moving().await_staged(self._timeout_s)
        self._moving().verify(chunk)

    def abort(self) -> None:
        self._backend.abort()

    @property
    def enqueues_on_forward(self) -> bool:
        return self._migrator is not None and self._backend.enqueues_on_forward

    def open_exchange(self, epoch: int) -> None:
        self._backend.open_exchange(epoch)

    async def prepare(self, chunk: Chunk) -> None:
        self._moving().prepare(chunk)

    def enqueue(self, chunk: Chunk) -> None:
        self._moving().enqueue(chunk)

    async def arrive(self, chunk: Chunk) -> None:
        self._moving().await_staged(self._timeout_s)
        self._moving().verify(chunk)

    def _moving(self) -> Migrator:
        if self._migrator is None:
            raise RuntimeError("this balancer observes only and cannot move experts")
        return self._migrator


class BackgroundThread(Background):
    """Runs the jobs in a daemon thread, started by the first of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._job: Coroutine[None, None, None] | None = None
        self._wake = threading.Condition()
        self._is_closed = False

    @property
    def is_busy(self) -> bool:
        return self._job is not None

    def start(self, job: Coroutine[None, None, None]) -> None:
        with self._wake:
            if self._is_closed or self._job is not None:
                job.close()
                raise RuntimeError(f"{self._name} is {'closed' if self._is_closed else 'busy'}")
            self._job = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify_all()

    async def wait_idle(self, timeout_s: float) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: self._job is None, timeout_s)

    async def close(self, timeout_s: float) -> bool:
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                run_blocking(job)
            except Exception:
                logger.exception("%s: a job failed", self._name)
            finally:
                with self._wake:
                    self._job = None
                    self._wake.notify_all()

    def _next_job(self) -> Coroutine[None, None, None] | None:
        with self._wake:
            self._wake.wait_for(lambda: self._job is not None or self._is_closed)
            return self._job
