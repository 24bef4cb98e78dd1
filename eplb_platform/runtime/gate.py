"""The gate: the one place where a rank's forward thread and its background thread meet.

Boundaries are numbered by the forward passes that have ended. The background thread promises that the forward
thread will not pass a boundary before it knows what was decided; the forward thread waits only if it outruns
that promise, and acts at exactly the agreed boundary.
"""

from __future__ import annotations

import threading

from eplb_platform.runtime.actions import Action
from eplb_platform.runtime.ports import Clock

LOOKS = 8
"""The time for an answer is measured in so many parts: where the whole process was stopped for long, only one
of them is over, and the background thread has the others to learn the answer."""


class ForwardStopped(RuntimeError):
    """This rank cannot learn whether an action was agreed, so it must not run another forward pass."""


class ActionsDropped(RuntimeError):
    """All ranks agreed that no action of the running cycle will be executed."""


class ForwardGate:
    """Shared state of the two threads, guarded by one condition (`changed`), which the rank's `Clock` waits
    on. One action at a time.
    """

    def __init__(self, changed: threading.Condition | None = None) -> None:
        self.changed = threading.Condition() if changed is None else changed
        self._boundary = 0
        self._promise: int | None = None
        self._action: Action | None = None
        self._action_at: int | None = None
        self._is_acting = False
        self._was_executed = False
        self._fault: Exception | None = None
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
        Raises `ActionsDropped` between `drop_actions` and `reopen`.
        """
        with self.changed:
            if self._is_dropping:
                raise ActionsDropped("no action of this cycle will be executed")
            if self._failure is not None:
                raise ForwardStopped(f"an earlier promise cannot be answered: {self._failure}")
            self._promise = max(self._boundary + max(margin, 1), not_before)
            return self._promise

    def act_at(self, boundary: int, action: Action) -> None:
        """All ranks agreed: the forward thread executes `action` at `boundary`, unless actions are
        dropped.
        """
        with self.changed:
            self._was_executed, self._fault = False, None
            if self._is_dropping:
                return
            self._action_at, self._action, self._promise = boundary, action, None
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
    def has_acted(self) -> bool:
        """Whether no agreed action is left to be executed."""
        return self._action_at is None

    @property
    def is_acting(self) -> bool:
        """Whether the forward thread executes the agreed action right now."""
        return self._is_acting

    @property
    def was_executed(self) -> bool:
        """Whether the forward thread executed the action agreed last, with or without a fault."""
        return self._was_executed

    @property
    def fault(self) -> Exception | None:
        """What went wrong with the action agreed last."""
        return self._fault

    @property
    def is_dropping(self) -> bool:
        """Whether all ranks have agreed to execute no action of the running cycle."""
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

    async def pass_boundary(self, clock: Clock, timeout_s: float) -> Action | None:
        """Count a forward pass as ended; return what to execute now, if it was agreed for this boundary.

        Raises `ForwardStopped` when a promise is not answered within `timeout_s` seconds or cannot be
        answered.
        """
        with self.changed:
            self._boundary += 1
        if not self._may_pass(self._boundary):
            for _ in range(LOOKS):
                if await clock.until(lambda: self._may_pass(self._boundary), timeout_s / LOOKS):
                    break
        with self.changed:  # a promise that is made meanwhile lies ahead
            if self._is_unanswered(self._boundary):
                raise ForwardStopped(self._unanswered(timeout_s)) from self._failure
            if self._action_at is not None and self._boundary > self._action_at:
                raise ForwardStopped(
                    f"boundary {self._boundary} is past the agreed action at {self._action_at}"
                )
            return self._begin() if self._boundary == self._action_at else None

    def agreed_action(self) -> Action | None:
        """What is agreed and not executed yet, whatever its boundary."""
        return self._action

    def take_agreed_action(self) -> Action | None:
        """The same, to be executed now: the forward threads of all ranks are between two passes."""
        with self.changed:
            return None if self._action is None else self._begin()

    def acted(self, fault: Exception | None = None) -> None:
        """The forward thread has executed the agreed action; `fault` says what went wrong with it."""
        with self.changed:
            self._action_at = self._action = None
            self._is_acting, self._was_executed, self._fault = False, True, fault
            self.changed.notify_all()

    def drop_actions(self) -> None:
        """Execute no action of the running cycle: the forward threads of all ranks have agreed on it.

        Void every promise too, answered or not. In force until `reopen`.
        """
        with self.changed:
            self._is_dropping = True
            self._promise = self._action_at = self._action = self._failure = None
            self.changed.notify_all()

    def reopen(self) -> None:
        """The running cycle has ended: actions of later ones are executed."""
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
            self._promise = self._action_at = self._action = self._failure = None
            self.changed.notify_all()

    def close(self) -> None:
        """The forward thread makes no more passes: what is agreed and not executed yet never will be."""
        with self.changed:
            self._is_closed = True
            self.changed.notify_all()

    def _begin(self) -> Action | None:
        self._is_acting = True
        self.changed.notify_all()
        return self._action

    def _is_unanswered(self, boundary: int) -> bool:
        return self._promise is not None and boundary >= self._promise

    def _may_pass(self, boundary: int) -> bool:
        return not self._is_unanswered(boundary) or self._failure is not None

    def _unanswered(self, timeout_s: float) -> str:
        why = f"({self._failure})" if self._failure else f"within {timeout_s:g} s"
        where = f"boundary {self._promise}"
        return f"whether to act at {where} did not reach this rank {why}; it does not guess"
