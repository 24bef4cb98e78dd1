"""The ranks of one epoch as NIXL knows them: whoever receives reads from its peer's memory.

    sender                                   receiver
    offer (number, address, bytes)  ------>  reads what was offered
    sent                            <------  read (number), sent by the library behind the read

Only memory that was registered when the group was made is read and written: the rooms through which
`HostTransfer` moves weights. No weight and no staging is the library's to touch, so what a peer still reads
or writes late can spoil none. The library has no thread of its own: it moves on while a rank is in here, and
a rank stays in `exchange` until its peers have read everything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Lock
from typing import NoReturn, TypeVar
from uuid import uuid4

import torch
from torch.distributed import PrefixStore, Store

from eplb_backends.accelerator import nixl_library
from eplb_backends.accelerator.nixl_library import Agent, Region, Transfer
from eplb_platform.backend import GroupError, Message

_POLL_S = 0.0001
_STORE_POLL_S = 0.005
_PING_S = 0.25
"""How often a peer that is waited for is sent a word: the library then says if the connection is gone."""
_QUIET_S = 1.0
"""How long an end waits for reads that are under way."""
_GOODBYE_S = 0.02

_OFFER, _READ, _PING, _BYE = b"offer", b"read", b"ping", b"bye"
_YES, _NO = b"+", b"-"

Result = TypeVar("Result")


class Declined(Exception):
    """A rank cannot go by NIXL, or does not want to; every rank of the group is told the same."""


@dataclass(frozen=True)
class Rooms:
    """Memory that peers may read: uint8 tensors that lie together, all on one device."""

    tensors: Sequence[torch.Tensor]

    @property
    def kind(self) -> str:
        return "DRAM" if not self.tensors or self.tensors[0].device.type == "cpu" else "VRAM"


def decline(store: Store, rank: int, epoch: int, reason: str) -> None:
    """Tell whoever would go by NIXL that this rank does not."""
    _store_of(store, epoch).set(f"offer/{rank}", f"{_NO.decode()}{reason}")


class NixlGroup:
    """A `HostGroup`. All methods but `close` are called from one thread at a time."""

    def __init__(self, store: Store, rank: int, ranks: Sequence[int], epoch: int, rooms: Rooms) -> None:
        self._store = _store_of(store, epoch)
        self._rank = rank
        self._peers = [peer for peer in ranks if peer != rank]
        self._own_name = f"eplb-{epoch}-{rank}-{uuid4().hex}"
        self._rooms = rooms
        self._agent: Agent | None = None
        self._names: dict[int, str] = {}
        self._peer_of: dict[str, int] = {}
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        self._offers: dict[tuple[int, int], Region] = {}
        """(peer, number of the message) -> where it lies there."""
        self._unread: set[tuple[int, int]] = set()
        self._reading: dict[tuple[int, int], Transfer] = {}
        self._lock = Lock()  # of the agent and of what is above; held for short calls only
        self._closed = Event()
        self._why_closed = "the group was closed on this rank"

    @property
    def is_closed(self) -> bool:
        """Whether the group has ended on this rank."""
        return self._closed.is_set()

    def join(self, timeout_s: float, *, is_given_up: Callable[[], bool]) -> None:
        """Meet the other ranks on the store and read a byte from each.

        is_given_up: asked again and again; ends the wait
        Raises `Declined`, on all ranks alike, where one of them cannot; `GroupError` where one is missing.
        """
        deadline = time.monotonic() + timeout_s
        self._publish("offer", self._offer())
        self._add(self._collect("offer", deadline, is_given_up))
        self._publish("verdict", self._try_pairs((deadline - time.monotonic()) / 2))
        self._collect("verdict", deadline, is_given_up)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], timeout_s: float) -> None:
        """As `Backend.exchange`, for tensors in the rooms. Closes the group when it fails."""
        deadline = time.monotonic() + timeout_s
        wanted: dict[tuple[int, int], torch.Tensor] = {}
        for message in receives:
            wanted[message.peer, self._received[message.peer]] = message.tensor
            self._received[message.peer] += 1
        for message in sends:
            self._send_offer(message)
        pinged = time.monotonic()
        while not self._move_on(wanted):
            now = time.monotonic()
            if now > deadline:
                self._fail(f"nothing from ranks {self._awaited(wanted)} within {timeout_s:g} s")
            if now > pinged + _PING_S:
                pinged = now
                for peer in self._awaited(wanted):
                    self._call(f"rank {peer}", self._notify, peer, _PING)
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the group here and on the peers. Any thread, at any time."""
        self._end("the group was closed on this rank")

    def is_quiet(self) -> bool:
        """Whether no read into the rooms is under way, so that they may be used again. For closed groups."""
        with self._lock:
            self._drop_ended()
            if not self._reading:
                self._agent = None
            return not self._reading

    # --- meeting ---

    def _offer(self) -> bytes:
        try:
            agent = nixl_library.new_agent(self._own_name)
            regions = [(*_region(room), "") for room in self._rooms.tensors]
            if regions:
                agent.register_memory(regions, self._rooms.kind)
            metadata = agent.get_agent_metadata()
        except Exception as error:  # the library's errors have no class of their own
            return _NO + f"NIXL does not start: {_one_line(error)}".encode()
        with self._lock:
            self._agent = agent
        return _YES + metadata

    def _add(self, offers: Mapping[int, bytes]) -> None:
        for peer in self._peers:
            self._call(f"connecting to rank {peer}", self._add_peer, peer, offers[peer])

    def _add_peer(self, agent: Agent, peer: int, metadata: bytes) -> None:
        name = agent.add_remote_agent(metadata)
        self._names[peer] = name.decode() if isinstance(name, bytes) else name
        self._peer_of[self._names[peer]] = peer

    def _try_pairs(self, timeout_s: float) -> bytes:
        if not self._peers:
            return _YES
        source, target = (room[:1] for room in self._rooms.tensors[:2])
        try:
            self.exchange(
                [Message(peer, source) for peer in self._peers],
                [Message(peer, target) for peer in self._peers],
                timeout_s,
            )
        except GroupError as error:
            return _NO + str(error).encode()
        return _YES

    def _publish(self, subject: str, answer: bytes) -> None:
        self._ask_store(subject, self._store.set, f"{subject}/{self._rank}", answer)

    def _collect(self, subject: str, deadline: float, is_given_up: Callable[[], bool]) -> Mapping[int, bytes]:
        """What each rank published, without its first byte."""
        keys = {rank: f"{subject}/{rank}" for rank in sorted([self._rank, *self._peers])}
        while not self._ask_store(subject, self._store.check, list(keys.values())):
            if is_given_up():
                self._fail("the group was closed on this rank")
            if time.monotonic() > deadline:
                there = {rank: self._ask_store(subject, self._store.check, [keys[rank]]) for rank in keys}
                self._fail(f"{subject}: no sign of ranks {[rank for rank in keys if not there[rank]]}")
            time.sleep(_STORE_POLL_S)
        answers = {rank: bytes(self._ask_store(subject, self._store.get, key)) for rank, key in keys.items()}
        for rank, answer in answers.items():
            if answer[:1] != _YES:
                self.close()
                raise Declined(f"rank {rank}: {answer[1:].decode()}")
        return {rank: answer[1:] for rank, answer in answers.items()}

    def _ask_store(self, subject: str, operation: Callable[..., Result], *arguments: object) -> Result:
        try:
            return operation(*arguments)
        except RuntimeError as error:
            self._fail(f"{subject}: {_one_line(error)}", error)

    # --- messages ---

    def _send_offer(self, message: Message) -> None:
        key = message.peer, self._sent[message.peer]
        self._sent[message.peer] += 1
        self._unread.add(key)
        words = b" ".join(str(number).encode() for number in (key[1], *_region(message.tensor)))
        self._call(f"offering to rank {message.peer}", self._notify, message.peer, _OFFER + b" " + words)

    def _move_on(self, wanted: dict[tuple[int, int], torch.Tensor]) -> bool:
        """Read what has been offered of `wanted`; whether there is nothing left to wait for."""
        self._call("listening", self._listen)
        for key in [key for key in wanted if key in self._offers]:
            self._call(f"reading from rank {key[0]}", self._start_read, key, wanted.pop(key))
        self._call("reading", self._look_at_reads)
        return not (wanted or self._reading or self._unread)

    def _listen(self, agent: Agent) -> None:
        for name, notices in agent.get_new_notifs().items():
            if name in self._peer_of:
                for notice in notices:
                    self._hear(self._peer_of[name], *notice.split())

    def _hear(self, peer: int, word: bytes, *numbers: bytes) -> None:
        if word == _BYE:
            raise GroupError(f"rank {peer} ended the group")
        if word == _OFFER:
            number, address, nbytes, device = map(int, numbers)
            self._offers[peer, number] = (address, nbytes, device)
        elif word == _READ:
            self._unread.discard((peer, int(numbers[0])))

    def _start_read(self, agent: Agent, key: tuple[int, int], tensor: torch.Tensor) -> None:
        region, offered = _region(tensor), self._offers.pop(key)
        if offered[1] != region[1]:
            raise GroupError(f"rank {key[0]} offers {offered[1]} bytes where {region[1]} are expected")
        handle = agent.initialize_xfer(
            "READ",
            agent.get_xfer_descs([region], self._rooms.kind),
            agent.get_xfer_descs([offered], self._rooms.kind),
            self._names[key[0]],
            _READ + b" " + str(key[1]).encode(),
        )
        self._reading[key] = handle
        if agent.transfer(handle) == "ERR":
            raise GroupError("the library cannot read there")

    def _look_at_reads(self, agent: Agent) -> None:
        for (peer, number), handle in list(self._reading.items()):
            state = agent.check_xfer_state(handle)
            if state == "PROC":
                continue
            del self._reading[peer, number]
            handle.release()
            if state != "DONE":
                raise GroupError(f"a read from rank {peer} failed")

    def _notify(self, agent: Agent, peer: int, notice: bytes) -> None:
        agent.send_notif(self._names[peer], notice)

    def _awaited(self, wanted: Mapping[tuple[int, int], torch.Tensor]) -> list[int]:
        return sorted({peer for peer, _ in (*wanted, *self._reading, *self._unread)})

    # --- ends ---

    def _call(self, what: str, operation: Callable[..., None], *arguments: object) -> None:
        """Call into the library; on failure close the group, so that the peers fail at once too."""
        try:
            with self._lock:
                if self._closed.is_set() or self._agent is None:
                    raise GroupError(self._why_closed)
                operation(self._agent, *arguments)
        except Exception as error:  # the library's errors have no class of their own
            self._fail(f"{what}: {_one_line(error)}", error)

    def _fail(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        self._end(reason)
        raise GroupError(f"rank {self._rank}: NIXL: {reason}") from cause

    def _end(self, reason: str) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._why_closed = reason
            for peer in self._names:
                with suppress(Exception):  # one that has gone needs no word
                    if self._agent is not None:
                        self._notify(self._agent, peer, _BYE)
        self._await_reads()

    def _await_reads(self) -> None:
        """Let the words go out, and reads that are under way come to their end."""
        begun = time.monotonic()
        while time.monotonic() < begun + _GOODBYE_S or not self._ended(begun + _QUIET_S):
            with self._lock, suppress(Exception):
                if self._agent is not None:
                    self._agent.get_new_notifs()
            time.sleep(_POLL_S)
        self.is_quiet()

    def _ended(self, deadline: float) -> bool:
        with self._lock:
            self._drop_ended()
            return not self._reading or time.monotonic() > deadline

    def _drop_ended(self) -> None:
        for key, handle in list(self._reading.items()):
            if self._agent is not None and _state(self._agent, handle) != "PROC":
                del self._reading[key]
                with suppress(Exception):
                    handle.release()


def _store_of(store: Store, epoch: int) -> Store:
    return PrefixStore(f"eplb/{epoch}/nixl", store)


def _state(agent: Agent, handle: Transfer) -> str:
    try:
        return agent.check_xfer_state(handle)
    except Exception:  # so it says that the peer has gone
        return "ERR"


def _region(tensor: torch.Tensor) -> Region:
    return tensor.data_ptr(), tensor.nbytes, tensor.device.index or 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
