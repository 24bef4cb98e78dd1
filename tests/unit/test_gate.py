from __future__ import annotations

import threading

import pytest

from eplb_platform.runtime.actions import Commit
from eplb_platform.runtime.gate import ForwardGate, ForwardStopped
from eplb_platform.runtime.ports import run_blocking
from eplb_platform.runtime.production import ThreadClock

A_LONG_TIME_S = 60.0
A_SHORT_TIME_S = 0.05


@pytest.fixture
def commit() -> Commit:
    """The gate only carries the commit."""
    return object.__new__(Commit)


def pass_boundary(gate: ForwardGate, timeout_s: float) -> Commit | None:
    """As a forward thread does."""
    return run_blocking(gate.pass_boundary(ThreadClock(gate.changed), timeout_s))


def test_boundaries_pass_freely_without_a_promise() -> None:
    gate = ForwardGate()
    assert [pass_boundary(gate, A_SHORT_TIME_S) for _ in range(3)] == [None] * 3
    assert gate.boundary == 3


def test_an_offer_lies_ahead_by_the_margin_and_not_before_the_given_boundary() -> None:
    gate = ForwardGate()
    pass_boundary(gate, A_SHORT_TIME_S)
    assert gate.promise(margin=4, not_before=0) == 5
    assert gate.promise(margin=4, not_before=30) == 30
    assert gate.promise(margin=0, not_before=0) == 2, "the boundary already passed can never be offered"


def test_the_commit_is_committed_at_exactly_the_agreed_boundary(commit: Commit) -> None:
    gate = ForwardGate()
    gate.promise(margin=2, not_before=0)
    gate.act_at(4, commit)
    assert [pass_boundary(gate, A_SHORT_TIME_S) for _ in range(3)] == [None] * 3
    assert pass_boundary(gate, A_SHORT_TIME_S) is commit
    assert not gate.has_acted
    gate.acted()
    assert gate.has_acted
    assert pass_boundary(gate, A_SHORT_TIME_S) is None


def test_the_forward_thread_waits_only_at_its_promise_and_goes_on_with_the_answer(commit: Commit) -> None:
    gate = ForwardGate()
    gate.promise(margin=2, not_before=0)
    assert not gate.would_wait
    assert pass_boundary(gate, A_SHORT_TIME_S) is None
    assert gate.would_wait
    seen: list[Commit | None] = []
    forward = threading.Thread(target=lambda: seen.append(pass_boundary(gate, A_LONG_TIME_S)))
    forward.start()
    gate.act_at(2, commit)
    forward.join(A_LONG_TIME_S)
    assert seen == [commit]


def test_a_released_promise_holds_nobody() -> None:
    gate = ForwardGate()
    gate.promise(margin=1, not_before=0)
    gate.release()
    assert pass_boundary(gate, A_SHORT_TIME_S) is None


def test_an_unanswered_promise_stops_the_forward_thread() -> None:
    gate = ForwardGate()
    gate.promise(margin=1, not_before=0)
    with pytest.raises(ForwardStopped, match=r"did not reach this rank within 0\.05 s"):
        pass_boundary(gate, A_SHORT_TIME_S)


def test_a_lost_store_stops_the_forward_thread_with_its_reason() -> None:
    gate = ForwardGate()
    gate.promise(margin=1, not_before=0)
    gate.fail(ConnectionError("store is gone"))
    with pytest.raises(ForwardStopped, match="store is gone"):
        pass_boundary(gate, A_LONG_TIME_S)


def test_an_agreed_commit_is_never_passed_over(commit: Commit) -> None:
    gate = ForwardGate()
    gate.act_at(1, commit)
    pass_boundary(gate, A_SHORT_TIME_S)
    with pytest.raises(ForwardStopped, match="past the agreed action at 1"):
        pass_boundary(gate, A_SHORT_TIME_S)


def test_after_a_lost_store_no_new_promise_covers_up_the_old_one() -> None:
    gate = ForwardGate()
    gate.promise(margin=1, not_before=0)
    gate.fail(ConnectionError("store is gone"))
    with pytest.raises(ForwardStopped, match="earlier promise"):
        gate.promise(margin=50, not_before=0)
    with pytest.raises(ForwardStopped, match="store is gone"):
        pass_boundary(gate, A_SHORT_TIME_S)


def test_a_closed_gate_says_that_an_agreed_commit_will_not_come(commit: Commit) -> None:
    gate = ForwardGate()
    gate.act_at(5, commit)
    gate.close()
    assert gate.is_closed
    assert not gate.has_acted
