"""The processes of one phase, seen from the command: started together, watched, and never left behind."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import cast

from eplb_platform.demo.messages import Failure, Orders, Progress, RankResult

GRACE_S = 2.0
"""How long to wait for the other ranks' reports after one failed: the cause may be among them."""


class RankFailed(RuntimeError):
    """A rank ended before its phase did; the message names it and its error."""


def context() -> ForkServerContext:
    """Processes forked from one that has imported torch and the model code once, and done nothing else."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["eplb_platform.demo.before_fork"])
    return forkserver


def start_importing() -> None:
    """Start the process that ranks are forked from; it imports in the background."""
    from multiprocessing.forkserver import ensure_running

    # One thread each: ranks share few cores. Nothing may be fetched from the hub.
    for name, value in (
        ("OMP_NUM_THREADS", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    context()
    ensure_running()


def _run_rank(orders: Orders, reports: Connection) -> None:
    """The main function of a rank's process; the command itself never imports what the ranks need."""
    from eplb_platform.demo.rank_process import run_rank

    run_rank(orders, reports)


class Ranks(AbstractContextManager["Ranks"]):
    """All ranks of a phase. Leaving the context ends whatever still runs."""

    def __init__(self, orders: Sequence[Orders]) -> None:
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        try:
            for order in orders:
                self._start(order)
        except OSError as error:
            self.__exit__()
            raise RankFailed(f"its process cannot be started: {error}") from error

    def _start(self, order: Orders) -> None:
        starter = context()
        receiver, sender = starter.Pipe(duplex=False)
        process = starter.Process(
            target=_run_rank, args=(order, sender), name=f"rank {order.rank}", daemon=True
        )
        process.start()
        sender.close()
        self._processes.append(process)
        self._pipes.append(receiver)

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    def results(self, on_progress: Callable[[int, Progress], None]) -> list[RankResult]:
        """Wait until every rank has handed back its result; raises `RankFailed` for the first that cannot."""
        results: dict[int, RankResult] = {}
        failures: dict[int, Failure] = {}
        deadline: float | None = None
        open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while open_pipes and (deadline is None or time.monotonic() < deadline):
            for pipe in wait(list(open_pipes), timeout=0.2):
                pipe = cast(Connection, pipe)
                rank = open_pipes[pipe]
                match self._receive(pipe, rank):
                    case Progress() as progress:
                        on_progress(rank, progress)
                    case RankResult() as result:
                        results[rank] = result
                        del open_pipes[pipe]
                    case Failure() as failure:
                        failures[rank] = failure
                        del open_pipes[pipe]
            if failures and deadline is None:
                deadline = time.monotonic() + GRACE_S
        if failures:
            rank = min(failures, key=lambda rank: failures[rank].at)
            raise RankFailed(f"rank {rank}: {failures[rank].message}")
        return [results[rank] for rank in range(len(self._pipes))]

    def _receive(self, pipe: Connection, rank: int) -> Progress | RankResult | Failure:
        """The next report of a rank; a rank that died without one is the cause of whatever follows."""
        try:
            return pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(GRACE_S)
            return Failure(f"the process ended with exit code {process.exitcode}", at=0.0)
