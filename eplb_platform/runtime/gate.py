"""The commit gate: the one place where a rank's forward thread and its background thread meet.

Boundaries are numbered by the forward passes that have ended. The background thread promises that the forward
thread will not pass a boundary before it knows what was decided; the forward thread waits only if it outruns
that promise, and executes the commit at exactly the agreed boundary.
"""

from __future__ import annotations

import threading

from eplb_platform.runtime.commit import Commit
from eplb_platform.runtime.ports import Clock


class ForwardStopped(RuntimeError):
    """This rank cannot learn whether a commit was agreed, so it must not run another forward pass."""


class CommitsDropped(RuntimeError):
    """All ranks agreed that no commit of the running cycle will be executed."""


class CommitGate:
    """Shared state of the two threads, guarded by one condition (`changed`), which the rank's `Clock` waits
    on.
    """

    def __init__(self, changed: threading.Condition | None = None) -> None:
        self.changed = threading.Condition() if changed is None else changed
        self._boundary = 0
        self._promise: int | None = None
        self._commit: Commit | None = None
        self._commit_at: int | None = None
        self._failure: BaseException | None = None
        self._is_dropping = False
        self._is_closed = False

    @property
    def boundary(self) -> int:
        """Forward passes that have ended."""
        return self._boundary

    # --- background thread ---

    def promise(self, margin: int, not_before: int) -> int:
        """Offer a boundary and promise, in the same instant, not to pass it unanswered.

        Raises `ForwardStopped` after `fail`: a new promise would cover up the one that nobody can answer.
        Raises `CommitsDropped` between `drop_commits` and `reopen`.
        """
        with self.changed:
            if self._is_dropping:
                raise CommitsDropped("no commit of this cycle will be executed")
            if self._failure is not None:
                raise ForwardStopped(f"an earlier promise cannot be answered: {self._failure}")
            self._promise = max(self._boundary + max(margin, 1), not_before)
            return self._promise

    def commit_at(self, boundary: int, commit: Commit) -> None:
        """All ranks agreed: the forward thread executes `commit` at `boundary`, unless commits are
        dropped.
        """
        with self.changed:
            if self._is_dropping:
                return
            self._commit_at, self._commit, self._promise = boundary, commit, None
            self.changed.notify_all()

    def release(self) -> None:
        """Nothing was agreed: the promise is void."""
        with self.changed:
            self._promise = None
            self.changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """The decision cannot be learnt: the forward thread stops when it reaches its promise."""
        with self.changed:
            if self._promise is not None:
                self._failure = failure
            self.changed.notify_all()

    @property
    def is_committed(self) -> bool:
        """Whether no agreed commit is left to be executed."""
        return self._commit_at is None

    @property
    def is_dropping(self) -> bool:
        """Whether all ranks have agreed to execute no commit of the running cycle."""
        return self._is_dropping

    @property
    def is_closed(self) -> bool:
        """Whether the forward thread makes no more passes."""
        return self._is_closed

    # --- forward thread ---

    @property
    def would_wait(self) -> bool:
        """Whether the next `pass_boundary` has to wait for an answer."""
        return self._is_unanswered(self._boundary + 1)

    async def pass_boundary(self, clock: Clock, timeout_s: float) -> Commit | None:
        """Count a forward pass as ended; return the commit to execute now, if one was agreed for this
        boundary.

        Raises `ForwardStopped` when a promise is not answered within `timeout_s` seconds or cannot be
        answered.
        """
        with self.changed:
            self._boundary += 1
        if not self._may_pass(self._boundary):
            await clock.until(lambda: self._may_pass(self._boundary), timeout_s)
        with self.changed:  # a promise that is made meanwhile lies ahead
            if self._is_unanswered(self._boundary):
                raise ForwardStopped(self._unanswered(timeout_s)) from self._failure
            if self._commit_at is not None and self._boundary > self._commit_at:
                raise ForwardStopped(
                    f"boundary {self._boundary} is past the agreed commit at {self._commit_at}"
                )
            return self._commit if self._boundary == self._commit_at else None

    def committed(self) -> None:
        """The forward thread has executed the agreed commit."""
        with self.changed:
            self._commit_at = self._commit = None
            self.changed.notify_all()

    def agreed_commit(self) -> Commit | None:
        """The commit that is agreed and not executed yet, whatever its boundary; for when the forward
        threads of all ranks are between two passes.
        """
        return self._commit

    def drop_commits(self) -> None:
        """Execute no commit of the running cycle: the forward threads of all ranks have agreed on it.

        Void every promise too, answered or not. In force until `reopen`.
        """
        with self.changed:
            self._is_dropping = True
            self._promise = self._commit_at = self._commit = self._failure = None
            self.changed.notify_all()

    def reopen(self) -> None:
        """The running cycle has ended: commits of later ones are executed."""
        with self.changed:
            self._is_dropping = False

    @property
    def failure(self) -> BaseException | None:
        """Why a decision cannot be learnt."""
        return self._failure

    def start_anew(self, boundary: int) -> None:
        """No cycle runs, and other ranks are active from now on: count boundaries from this one."""
        with self.changed:
            self._boundary = boundary
            self._promise = self._commit_at = self._commit = self._failure = None
            self.changed.notify_all()

    def close(self) -> None:
        """The forward thread makes no more passes: what is agreed and not committed yet never will be."""
        with self.changed:
            self._is_closed = True
            self.changed.notify_all()

    def _is_unanswered(self, boundary: int) -> bool:
        return self._promise is not None and boundary >= self._promise

    def _may_pass(self, boundary: int) -> bool:
        return not self._is_unanswered(boundary) or self._failure is not None

    def _unanswered(self, timeout_s: float) -> str:
        why = f"({self._failure})" if self._failure else f"within {timeout_s:g} s"
        where = f"boundary {self._promise}"
        return f"whether to commit at {where} did not reach this rank {why}; it does not guess"
