"""`NixlGroup` and the rooms it reads into, over a library that is simulated in this process.

What the real library does is in tests/processes/test_nixl.py; here it does what it seldom does there.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import RLock, Timer

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from eplb_backends.accelerator import nixl_group, nixl_library
from eplb_backends.accelerator.nixl_group import Declined, NixlGroup, Rooms, decline
from eplb_backends.accelerator.nixl_library import Region
from eplb_platform.backend import GroupError, Message
from tests.simulated_backend import SimulatedBackend

ROOM = 256


@dataclass
class Fabric:
    """What all simulated agents share."""

    notices: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)
    lock: RLock = field(default_factory=RLock)
    is_stuck: bool = False
    """Reads that start now do not end."""
    stuck: list[SimulatedRead] = field(default_factory=list)
    fails: bool = False

    def agent(self, name: str) -> SimulatedAgent:
        self.notices[name] = []
        return SimulatedAgent(self, name)

    def land_late(self) -> None:
        for read in self.stuck:
            read.land()
        self.stuck.clear()


@dataclass
class SimulatedRead:
    fabric: Fabric
    local: Region
    remote: Region
    tell: Callable[[], None]
    state: str = "PROC"
    content: bytes = b""

    def leave(self) -> None:
        self.content = ctypes.string_at(self.remote[0], self.remote[1])

    def land(self) -> None:
        ctypes.memmove(self.local[0], self.content, self.local[1])
        self.tell()
        self.state = "DONE"

    def release(self) -> None:
        assert self.state != "PROC", "a read was given up that still writes"


@dataclass
class SimulatedAgent:
    fabric: Fabric
    name: str

    def register_memory(self, regions: Sequence[tuple[int, int, int, str]], kind: str, /) -> object:
        assert kind == "DRAM"
        return regions

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes, /) -> bytes:
        return metadata

    def get_xfer_descs(self, regions: Sequence[Region], kind: str, /) -> object:
        return regions[0]

    def initialize_xfer(
        self, operation: str, local: Region, remote: Region, name: str, notice: bytes, /
    ) -> SimulatedRead:
        return SimulatedRead(self.fabric, local, remote, lambda: self.send_notif(name, notice))

    def transfer(self, read: SimulatedRead, /) -> str:
        read.leave()
        if self.fabric.is_stuck:
            self.fabric.stuck.append(read)
            return "PROC"
        if self.fabric.fails:
            read.state = "ERR"
            return "PROC"
        read.land()
        self.fabric.land_late()  # the worst moment: what this read brought has not been copied yet
        return "PROC"

    def check_xfer_state(self, read: SimulatedRead, /) -> str:
        return read.state

    def send_notif(self, name: str, notice: bytes, /) -> None:
        with self.fabric.lock:
            self.fabric.notices[name].append((self.name, notice))

    def get_new_notifs(self) -> Mapping[str, Sequence[bytes]]:
        with self.fabric.lock:
            heard, self.fabric.notices[self.name] = self.fabric.notices[self.name], []
        by_name: dict[str, list[bytes]] = {}
        for sender, notice in heard:
            by_name.setdefault(sender, []).append(notice)
        return by_name


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    fabric = Fabric()
    monkeypatch.setattr(nixl_library, "new_agent", fabric.agent)
    monkeypatch.setattr(nixl_library, "is_installed", lambda: True)
    monkeypatch.setattr(nixl_group, "_QUIET_S", 0.05)
    return fabric


@dataclass
class Member:
    group: NixlGroup
    rooms: list[torch.Tensor]

    def exchange(self, peer: int, nbytes: int = ROOM, timeout_s: float = 60.0) -> None:
        out, into = self.rooms
        self.group.exchange([Message(peer, out[:nbytes])], [Message(peer, into[:nbytes])], timeout_s)


@pytest.fixture
def pair(fabric: Fabric) -> Iterator[tuple[Member, Member, ThreadPoolExecutor]]:
    store = HashStore()
    members = []
    for rank in range(2):
        rooms = [torch.full((ROOM,), 7 + rank, dtype=torch.uint8), torch.zeros(ROOM, dtype=torch.uint8)]
        members.append(Member(NixlGroup(store, rank, [0, 1], 0, Rooms(rooms)), rooms))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda member: member.group.join(60.0, is_given_up=lambda: False), members))
        yield members[0], members[1], threads


Pair = tuple[Member, Member, ThreadPoolExecutor]


def both(pair: Pair, first: Callable[[], None], second: Callable[[], None]) -> list[BaseException | None]:
    futures = [pair[2].submit(first), pair[2].submit(second)]
    return [future.exception(timeout=120.0) for future in futures]


def test_bytes_arrive_again_and_again(pair: Pair) -> None:
    for value in range(3):
        for rank, member in enumerate(pair[:2]):
            member.rooms[0].fill_(10 * value + rank)
        assert both(pair, lambda: pair[0].exchange(1), lambda: pair[1].exchange(0)) == [None, None]
        assert (pair[0].rooms[1] == 10 * value + 1).all() and (pair[1].rooms[1] == 10 * value).all()


def test_ranks_that_list_messages_of_different_length_both_fail(pair: Pair) -> None:
    first, second = both(pair, lambda: pair[0].exchange(1), lambda: pair[1].exchange(0, nbytes=9))
    assert isinstance(first, GroupError) and isinstance(second, GroupError)
    assert "bytes where" in f"{first} {second}" and "ended the group" in f"{first} {second}"


def test_a_read_that_fails_ends_the_group(fabric: Fabric, pair: Pair) -> None:
    fabric.fails = True
    for error in both(pair, lambda: pair[0].exchange(1), lambda: pair[1].exchange(0)):
        assert isinstance(error, GroupError)
    assert pair[0].group.is_closed and pair[1].group.is_closed


def test_a_rank_that_does_not_come_is_named(pair: Pair) -> None:
    with pytest.raises(GroupError, match=r"rank 0: NIXL: nothing from ranks \[1\] within 0.1 s"):
        pair[0].exchange(1, timeout_s=0.1)
    with pytest.raises(GroupError, match="nothing from ranks"):
        pair[0].exchange(1, timeout_s=0.1)


def test_a_closed_group_is_quiet_once_its_reads_have_ended(fabric: Fabric, pair: Pair) -> None:
    fabric.is_stuck = True
    both(pair, lambda: pair[0].exchange(1, timeout_s=1.5), lambda: pair[1].exchange(0, timeout_s=1.5))
    assert fabric.stuck
    assert not pair[0].group.is_quiet()
    fabric.land_late()
    assert pair[0].group.is_quiet()


def test_an_end_lets_reads_under_way_come_to_theirs(
    fabric: Fabric, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(pair, lambda: pair[0].exchange(1), lambda: pair[1].exchange(0))
    monkeypatch.setattr(nixl_group, "_QUIET_S", 10.0)
    fabric.is_stuck = True
    exchanges = [pair[2].submit(pair[0].exchange, 1), pair[2].submit(pair[1].exchange, 0)]
    while len(fabric.stuck) < 2:
        time.sleep(0.001)
    landing = Timer(0.2, fabric.land_late)
    landing.start()
    pair[0].group.close()
    assert not fabric.stuck
    landing.join()
    for exchange in exchanges:
        exchange.exception(timeout=120.0)


def test_an_abort_ends_the_exchange_of_the_peers_at_once(fabric: Fabric) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    backends = [SimulatedBackend(transport="nixl", pinned_bytes=8 * ROOM) for _ in range(2)]
    received = torch.zeros(ROOM, dtype=torch.uint8)

    def receive() -> None:
        with backends[1].streams.transfer():
            backends[1].exchange([], [Message(0, received)])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda rank: backends[rank].connect(store, rank, 2, timeout_s=60.0), range(2)))
        pending = threads.submit(receive)
        time.sleep(0.05)
        backends[0].abort()
        assert "rank 0 ended the group" in str(pending.exception(timeout=120.0))


def test_a_room_on_the_device_is_not_offered_while_its_former_owner_is_written(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    backend = ReadsDevice(transport="nixl", pinned_bytes=8 * ROOM)
    monkeypatch.setattr(type(backend.streams), "passed", lambda self, mark: False)
    with pytest.raises(GroupError, match=r"rank 0: the device was not done within 0\.1 s"):
        backend.connect(store, 0, 2, timeout_s=0.1)


def test_a_rank_that_declines_is_named_on_the_others(fabric: Fabric) -> None:
    store = HashStore()
    decline(store, 1, 0, "it has none")
    group = NixlGroup(store, 0, [0, 1], 0, Rooms([]))
    with pytest.raises(Declined, match="rank 1: it has none"):
        group.join(60.0, is_given_up=lambda: False)


def test_a_rank_that_is_missing_ends_the_join_in_time(fabric: Fabric) -> None:
    group = NixlGroup(HashStore(), 0, [0, 1], 0, Rooms([]))
    with pytest.raises(GroupError, match=r"offer: no sign of ranks \[1\]"):
        group.join(0.1, is_given_up=lambda: False)


class ReadsDevice(SimulatedBackend):
    nixl_reads_device = True


@pytest.mark.parametrize("starts", [True, False])
def test_rooms_on_the_device_serve_unless_gloo_has_to(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    def agent(name: str) -> SimulatedAgent:
        if not starts and name.startswith("eplb-0-1-"):
            raise RuntimeError("no plugin")
        return fabric.agent(name)

    monkeypatch.setattr(nixl_library, "new_agent", agent)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def swap(rank: int) -> tuple[str, str, int]:
        backend = ReadsDevice(transport="auto", pinned_bytes=8 * ROOM)
        backend.connect(store, rank, 2, timeout_s=60.0)
        backend.warm_up()
        received = torch.zeros(5 * ROOM, dtype=torch.uint8)
        with backend.streams.transfer():
            backend.exchange(
                [Message(1 - rank, torch.full_like(received, 5 + rank))], [Message(1 - rank, received)]
            )
            while not backend.streams.passed(backend.streams.record()):
                pass
        backend.close()
        return backend.transport, backend.collective, int(received.unique())

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(swap, range(2)))
    way = ("nixl", "nixl") if starts else ("host", "gloo")
    assert found == [(*way, 6), (*way, 5)]


def test_a_read_that_lands_in_a_later_epoch_spoils_nothing(fabric: Fabric) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    backends = [SimulatedBackend(transport="auto", pinned_bytes=8 * ROOM) for _ in range(2)]
    received = torch.zeros(2, ROOM, dtype=torch.uint8)

    def start(rank: int) -> None:
        backends[rank].connect(store, rank, 2, timeout_s=60.0)

    def swap(rank: int, value: int) -> None:
        sent = torch.full((ROOM,), value, dtype=torch.uint8)
        with backends[rank].streams.transfer():
            backends[rank].exchange([Message(1 - rank, sent)], [Message(1 - rank, received[rank])])
            while not backends[rank].streams.passed(backends[rank].streams.record()):
                pass

    def interrupted(rank: int) -> None:
        backends[rank]._timeout_s = 1.5
        with pytest.raises(GroupError):
            swap(rank, value=1)
        backends[rank].abort()
        backends[rank]._timeout_s = 60.0

    def again(rank: int) -> None:
        backends[rank].rebuild(epoch=1)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(start, range(2)))
        fabric.is_stuck = True
        list(threads.map(interrupted, range(2)))
        fabric.is_stuck = False
        late, fabric.stuck = fabric.stuck, []
        assert late and not received.any()
        list(threads.map(again, range(2)))
        fabric.stuck = late
        list(threads.map(swap, range(2), (2, 2)))
        assert (received == 2).all()
    for backend in backends:
        backend.close()
