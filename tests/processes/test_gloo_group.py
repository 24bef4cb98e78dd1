"""Failures of the CPU backend's group beyond the contract: stopped, killed and confused ranks."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.distributed import Store

from eplb_backends.cpu import CpuBackend
from eplb_platform.backend import GroupError, Message
from eplb_platform.testing.processes import RankPool

pytestmark = pytest.mark.processes

LONG_S = 200.0
"""A time-out that no test is to see."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3, timeout_s=300.0) as pool:
        yield pool


def connected(store: Store, rank: int, num_ranks: int, timeout_s: float) -> CpuBackend:
    backend = CpuBackend()
    store.set(f"here {rank}", "")
    wait_for(store, *(f"here {other}" for other in range(num_ranks)))
    backend.connect(store, rank, num_ranks, timeout_s)
    backend.warm_up()
    return backend


def ring(rank: int, num_ranks: int, size: int) -> tuple[list[Message], list[Message]]:
    sent, received = torch.full((size,), rank, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return [Message((rank + 1) % num_ranks, sent)], [Message((rank - 1) % num_ranks, received)]


def wait_for(store: Store, *keys: str) -> None:
    store.wait(list(keys))


def abort_again_and_again(rank: int, num_ranks: int, store: Store, epochs: int) -> list[str]:
    """In each epoch another rank aborts at another moment; afterwards the group works, with right data."""
    backend = connected(store, rank, num_ranks, LONG_S)
    errors = []
    moments = random.Random(0)
    for epoch in range(1, epochs + 1):
        moment = moments.uniform(0.0, 0.05)
        sends, receives = ring(rank, num_ranks, 8 * 2**20)
        if epoch % num_ranks == rank:
            threading.Timer(moment, backend.abort).start()
        started = time.monotonic()
        try:
            while True:
                backend.exchange(sends, receives)
        except GroupError as error:
            errors.append(str(error))
        assert time.monotonic() - started < LONG_S / 2, "ended by the time-out"
        backend.rebuild(epoch)
        sends, receives = ring(rank, num_ranks, 1000)
        backend.exchange(sends, receives)
        assert bool((receives[0].tensor == (rank - 1) % num_ranks).all())
        assert backend.sum_on_host(np.ones(1, np.int64)).tolist() == [num_ranks]
    backend.close()
    return errors


def stop_one_rank_for_longer_than_the_time_out(rank: int, num_ranks: int, store: Store) -> str:
    backend = connected(store, rank, num_ranks, 6.0)
    if rank == 0:
        store.set("pid", str(os.getpid()))
    if rank == 1:
        wait_for(store, "pid")
        os.kill(int(store.get("pid")), signal.SIGSTOP)
        store.set("stopped", "")
    if rank != 0:
        wait_for(store, "stopped")
    error = ""
    try:
        while True:
            backend.sum_on_host(np.ones(1000, np.int64))
            time.sleep(0.01)
    except GroupError as caught:
        error = str(caught)
    if rank == 1:
        wait_for(store, "failed 2")
        os.kill(int(store.get("pid")), signal.SIGCONT)
    store.set(f"failed {rank}", "")
    wait_for(store, "failed 0", "failed 1", "failed 2")
    backend.rebuild(1)
    assert backend.sum_on_host(np.ones(1, np.int64)).tolist() == [num_ranks]
    backend.close()
    return error


def die_in_an_exchange(rank: int, num_ranks: int, store: Store) -> float:
    """Seconds until the others know."""
    backend = connected(store, rank, num_ranks, LONG_S)
    sends, receives = ring(rank, num_ranks, 64 * 2**20)
    if rank == 0:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(GroupError):
        while True:
            backend.exchange(sends, receives)
    return time.monotonic() - started


def send_what_does_not_fit(rank: int, num_ranks: int, store: Store) -> str:
    """Rank 0 sends more to rank 1 than that expects."""
    backend = connected(store, rank, num_ranks, 4.0)
    try:
        if rank == 0:
            backend.exchange([Message(1, torch.ones(1000))], [])
        if rank == 1:
            backend.exchange([], [Message(0, torch.ones(10))])
    except GroupError as error:
        return str(error)
    finally:
        backend.close()
    return ""


def leave_one_message_over(rank: int, num_ranks: int, store: Store) -> str:
    """Rank 1 expects one message fewer than rank 0 sends, and the next exchange must not get it."""
    backend = connected(store, rank, num_ranks, 4.0)
    ones, twos = torch.ones(10), torch.full((10,), 2.0)
    received = torch.zeros(10)
    error = ""
    try:
        if rank == 0:
            backend.exchange([Message(1, ones), Message(1, ones)], [])
        if rank == 1:
            backend.exchange([], [Message(0, received)])
            backend.exchange([], [Message(0, received)])
    except GroupError as caught:
        error = str(caught)
    store.set(f"over {rank}", "")
    wait_for(store, *(f"over {other}" for other in range(num_ranks)))
    backend.rebuild(1)
    if rank == 0:
        backend.exchange([Message(1, twos)], [])
    if rank == 1:
        backend.exchange([], [Message(0, received)])
        assert torch.equal(received, twos)
    backend.close()
    return error


def abort_while_others_are_late(rank: int, num_ranks: int, store: Store) -> str:
    """Rank 0 waits in `rebuild` for ranks that do not come; abort from another thread ends that."""
    backend = connected(store, rank, num_ranks, LONG_S)
    if rank == 0:
        threading.Timer(0.2, backend.abort).start()
        started = time.monotonic()
        with pytest.raises(GroupError, match="closed") as caught:
            backend.rebuild(1)
        assert time.monotonic() - started < LONG_S / 2, "ended by the time-out"
        return str(caught.value)
    return ""


def test_a_group_survives_many_aborts(pool: RankPool) -> None:
    for errors in pool.run(abort_again_and_again, 30):
        assert len(errors) == 30
        assert all("rank" in error for error in errors)


def test_a_stopped_rank_fails_with_the_others_and_comes_back(pool: RankPool) -> None:
    errors = pool.run(stop_one_rank_for_longer_than_the_time_out)
    assert any("Timed out" in error for error in errors[1:]), errors
    assert all(errors)


def test_a_killed_rank_ends_the_others_at_once() -> None:
    with RankPool(3, timeout_s=300.0) as pool:
        killed, *others = pool.outcomes(die_in_an_exchange)
    assert killed.error is not None
    for other in others:
        assert other.error is None
        assert other.value is not None
        assert other.value < LONG_S / 2


def test_a_message_that_does_not_fit_is_an_error_on_both_ranks(pool: RankPool) -> None:
    errors = pool.run(send_what_does_not_fit)
    assert "sending to rank 1" in errors[0]
    assert "receiving from rank 0" in errors[1]


def test_a_message_left_over_is_an_error_and_never_taken_for_another(pool: RankPool) -> None:
    errors = pool.run(leave_one_message_over)
    assert errors[0]
    assert errors[1]


def test_abort_ends_a_rebuild_that_waits(pool: RankPool) -> None:
    assert pool.run(abort_while_others_are_late)[0]
