"""What a backend for accelerators does with its ways of weights: two ranks as threads, their streams late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import Store, TCPStore

from eplb_backends.accelerator.collective_transfer import DeviceGroup
from eplb_platform.backend import GroupError, Message, StreamOperations
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams
from eplb_platform.testing.simulated_collective import SimulatedCollective
from tests.simulated_backend import SimulatedBackend

TIMEOUT_S = 60.0


class Observed(SimulatedBackend):
    """Its device does nothing until somebody looks at a mark; notes the groups that it makes."""

    def __init__(self, transport: str) -> None:
        super().__init__(transport=transport, pinned_bytes=1 << 12)
        self.groups: list[SimulatedCollective] = []
        self.watchdog_timeouts: list[timedelta] = []

    def default_streams(self) -> StreamOperations:
        return SimulatedStreams(SimulatedDevice(0, eagerness=0.0))

    @property
    def simulated(self) -> SimulatedStreams:
        assert isinstance(self.streams, SimulatedStreams)
        return self.streams

    def _new_device_group(self, store: Store) -> DeviceGroup:
        self.watchdog_timeouts.append(self._watchdog_timeout)
        self.groups.append(SimulatedCollective(self.simulated, store, self._place[0]))
        return self.groups[-1]


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def connected(
    threads: ThreadPoolExecutor, store: TCPStore, *backends: SimulatedBackend, timeout_s: float = TIMEOUT_S
) -> list[str]:
    """Connect and warm up; how it failed on each rank."""

    def start(rank: int) -> str:
        try:
            backends[rank].connect(store, rank, len(backends), timeout_s)
            backends[rank].warm_up()
        except (GroupError, ValueError) as error:
            return str(error)
        return ""

    return list(threads.map(start, range(len(backends))))


def on_both(threads: ThreadPoolExecutor, work: Callable[[int], object]) -> None:
    list(threads.map(work, range(2)))


def test_ranks_with_different_transports_are_stopped_at_start(
    store: TCPStore, threads: ThreadPoolExecutor
) -> None:
    first, second = connected(threads, store, Observed("host"), Observed("collective"))
    assert second == "rank 1: transport is 'collective', but 'host' on rank 0"
    assert first.startswith("rank 0: ")


def test_no_group_is_made_while_a_graph_is_captured(store: TCPStore, threads: ThreadPoolExecutor) -> None:
    backend = Observed("collective")
    assert connected(threads, store, backend) == [""]
    backend.simulated.is_capturing = True
    with pytest.raises(RuntimeError, match="being captured"):
        backend.open_exchange(1)
    assert len(backend.groups) == 1  # of the warm-up
    backend.simulated.is_capturing = False
    backend.open_exchange(1)
    assert len(backend.groups) == 2


def test_a_rank_that_does_not_come_to_open_a_group_is_missed_before_the_library_waits(
    store: TCPStore, threads: ThreadPoolExecutor
) -> None:
    backends = Observed("collective"), Observed("collective")
    assert connected(threads, store, *backends) == ["", ""]
    on_both(threads, lambda rank: backends[rank].rebuild(1))
    backends[0]._timeout_s = 0.5
    with pytest.raises(GroupError, match="rank 0: open exchange"):
        backends[0].open_exchange(1)
    assert [len(backend.groups) for backend in backends] == [1, 1]


@pytest.mark.parametrize("timeout_s", [30.0, 3600.0])
def test_time_outs_of_ours_come_before_the_watchdogs(
    store: TCPStore, threads: ThreadPoolExecutor, timeout_s: float
) -> None:
    backend = Observed("collective")
    assert connected(threads, store, backend, timeout_s=timeout_s) == [""]
    (given,) = backend.watchdog_timeouts
    assert given.total_seconds() >= max(1800.0, 10 * timeout_s)


def test_an_abort_returns_when_nothing_is_on_its_way_from_pinned_memory(
    store: TCPStore, threads: ThreadPoolExecutor
) -> None:
    backends = Observed("host"), Observed("host")
    assert connected(threads, store, *backends) == ["", ""]
    received = torch.zeros(2, 100, dtype=torch.uint8)

    def exchange(rank: int) -> None:
        backend, sent = backends[rank], torch.full((100,), 7, dtype=torch.uint8)
        with backend.streams.transfer():
            backend.exchange([Message(1 - rank, sent)], [Message(1 - rank, received[rank])])
        backend.abort()

    on_both(threads, exchange)
    assert received.eq(7).all()


def test_an_abort_ends_a_batch_that_a_peer_never_enqueued(
    store: TCPStore, threads: ThreadPoolExecutor
) -> None:
    backends = Observed("collective"), Observed("collective")
    assert connected(threads, store, *backends) == ["", ""]
    backend, received = backends[0], torch.zeros(100, dtype=torch.uint8)
    with backend.streams.transfer():
        backend.prepare_exchange([], [Message(1, received)]).enqueue()
        mark = backend.streams.record()
    assert not backend.streams.passed(mark)
    backend.abort()
    kept = received.clone()
    backend.simulated.device.finish()
    assert backend.streams.passed(mark)
    assert torch.equal(received, kept)


@pytest.mark.parametrize("transport", ["host", "collective"])
def test_nothing_is_exchanged_before_connect_and_after_close(
    store: TCPStore, threads: ThreadPoolExecutor, transport: str
) -> None:
    backend = Observed(transport)
    with pytest.raises(GroupError, match="connect comes first"):
        backend.exchange([], [])
    assert connected(threads, store, backend) == [""]
    backend.close()
    with pytest.raises(GroupError):
        backend.exchange([], [])
