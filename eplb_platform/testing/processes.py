"""Run a function on several ranks, each a real process, with a store between them.

    def total(rank: int, num_ranks: int, store: Store, start: int) -> int: ...

    assert run_ranks(total, 4, 10) == [46, 46, 46, 46]

The function is a module-level one (it is sent by name), its arguments and results are pickled. Ranks are
forked from a server process that has done nothing but import torch (Python's forkserver, which ends with this
process): importing it in each of them would take seconds. `RankPool` runs many functions in the same ranks.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from io import TextIOWrapper
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar, TypeVarTuple, cast

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

Arguments = TypeVarTuple("Arguments")
Value = TypeVar("Value")
RankFunction = Callable[[int, int, "Store", *Arguments], Value]
"""Called with rank, number of ranks and a store of this call's own; then with the caller's arguments."""

_PRELOADED = ["torch", "torch.distributed", "numba"]
_START_S = 600.0
_GRACE_S = 60.0
"""Enough for the other ranks' own time-outs to speak."""
_LOG_TAIL = 3000


class RankError(RuntimeError):
    """At least one rank failed, died or took too long; the message has the traceback and the log of each."""


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What became of one rank's call: a value, or an error (the traceback, or how the process ended)."""

    rank: int
    value: Value | None
    error: str | None


@dataclass
class _Rank:
    """The parent's side of one process."""

    process: ForkServerProcess
    pipe: Connection
    log: Path


def run_ranks(
    function: RankFunction[*Arguments, Value],
    num_ranks: int,
    /,
    *args: *Arguments,
    timeout_s: float = 60.0,
) -> list[Value]:
    """Call `function(rank, num_ranks, store, *args)` on every rank and return the results by rank.

    `timeout_s` counts from when all processes have started. Raises `RankError`; leaves no process either way.
    """
    with RankPool(num_ranks, timeout_s=timeout_s) as pool:
        return pool.run(function, *args)


class RankPool:
    """Processes that run one function after the other. A context manager: at its end no process is left.

    A function that raises on some ranks leaves the pool usable. After a rank died or was late, all are
    killed, and the next call starts new ones.
    """

    def __init__(self, num_ranks: int, *, timeout_s: float = 60.0, grace_s: float = _GRACE_S) -> None:
        """timeout_s: for a call, from when all processes have started; grace_s: how long the other ranks may
        go on after one has failed.
        """
        if num_ranks < 1:
            raise ValueError(f"a pool needs at least 1 rank, got {num_ranks}")
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self.grace_s = grace_s
        self._ranks: list[_Rank] = []
        self._calls = 0
        self._store: TCPStore | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="eplb-ranks-")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        """The process of each rank; empty before the first call and after a call that had to kill."""
        return [cast(int, rank.process.pid) for rank in self._ranks]

    def run(self, function: RankFunction[*Arguments, Value], /, *args: *Arguments) -> list[Value]:
        """Results by rank. Raises `RankError` if any rank failed."""
        outcomes = self.outcomes(function, *args)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:
            name = getattr(function, "__qualname__", repr(function))
            ranks = ", ".join(str(outcome.rank) for outcome in failed)
            reports = "\n".join(f"--- rank {outcome.rank} ---\n{outcome.error}" for outcome in failed)
            raise RankError(f"{name} failed on rank {ranks} of {self.num_ranks}\n{reports}")
        return [cast(Value, outcome.value) for outcome in outcomes]

    def outcomes(
        self, function: RankFunction[*Arguments, Value], /, *args: *Arguments
    ) -> list[Outcome[Value]]:
        """What became of each rank; for tests in which ranks are meant to fail or die."""
        call = pickle.dumps((self._calls, function, args))
        self._calls += 1
        self._start()
        for rank in self._ranks:
            with suppress(OSError):  # a rank that has died is reported by _collect
                rank.pipe.send_bytes(call)
        return self._collect()

    def stop(self) -> None:
        """End every process: asked first, then killed, each by its own id."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.pipe.close()  # an idle rank ends by itself
        deadline = time.monotonic() + 1.0
        for rank in ranks:
            rank.process.join(max(deadline - time.monotonic(), 0.0))
            if rank.process.is_alive():
                rank.process.kill()  # reaches a stopped process too, which terminate does not
            rank.process.join()
            rank.process.close()

    def _start(self) -> None:
        if self._ranks:
            return
        port = self._serve_store()
        context = get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            log = Path(self._folder.name, f"rank{rank}.log")
            process = context.Process(
                target=_serve, args=(rank, self.num_ranks, port, theirs, log, dict(os.environ)), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, log))
        started: list[Outcome[None]] = self._collect(_START_S)
        if any(outcome.error is not None for outcome in started):
            raise RankError("ranks did not start:\n" + "\n".join(outcome.error or "" for outcome in started))

    def _serve_store(self) -> int:
        """The port of the store; its server lives in this process, so that it outlives every rank."""
        from torch.distributed import TCPStore

        if self._store is None:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def _collect(self, timeout_s: float | None = None) -> list[Outcome[Value]]:
        """Wait for every rank's answer; kill all when one died or is late."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        outcomes: dict[int, Outcome[Value]] = {}
        usable = True
        waiting = dict(enumerate(self._ranks))
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = connection.wait([rank.pipe for rank in waiting.values()], left)
            for number in [number for number, rank in waiting.items() if rank.pipe in ready]:
                outcomes[number], alive = self._answer(number, waiting.pop(number))
                usable = usable and alive
                if outcomes[number].error is not None:
                    deadline = min(deadline, time.monotonic() + self.grace_s)
        for number, rank in waiting.items():
            outcomes[number] = Outcome(number, None, f"did not finish in time; killed\n{_tail(rank.log)}")
        if waiting or not usable:
            self.stop()
        return [outcomes[number] for number in range(self.num_ranks)]

    def _answer(self, number: int, rank: _Rank) -> tuple[Outcome[Value], bool]:
        """A rank's outcome, and whether its process lives."""
        try:
            value, error = pickle.loads(rank.pipe.recv_bytes())
        except (EOFError, OSError):
            rank.process.join(5.0)
            text = f"process ended with exit code {rank.process.exitcode}\n{_tail(rank.log)}"
            return Outcome(number, None, text), False
        return Outcome(number, value, None if error is None else f"{error}{_tail(rank.log)}"), True


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace")[-_LOG_TAIL:] if log.exists() else ""
    return f"log:\n{text}" if text else ""


# --- in the child ---


def _serve(
    rank: int, num_ranks: int, port: int, pipe: Connection, log: Path, environment: dict[str, str]
) -> None:
    """Run what comes through the pipe until it is closed."""
    os.environ.update(environment)  # as it is now, not when the server was started
    _write_output_to(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from torch.distributed import PrefixStore, TCPStore

    torch.set_num_threads(1)
    client = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    pipe.send_bytes(pickle.dumps((None, None)))
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        log.write_text("")
        try:
            call, function, args = pickle.loads(message)
            answer = pickle.dumps(
                (function(rank, num_ranks, PrefixStore(f"call{call}", client), *args), None)
            )
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)


def _write_output_to(log: Path) -> None:
    """Send the process's output, what native libraries write included, to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
        cast(TextIOWrapper, stream).reconfigure(
            line_buffering=True
        )  # so that a killed rank's last words are there


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
