"""Weights on their way from device to device through pinned host memory and gloo, or rooms that NIXL reads.

What a pair of ranks has to say is one row of bytes, the same on both sides, cut into rounds of one size: a
round is one message for each pair. Two halves of the pinned memory take turns, so that the device fills the
next round while gloo sends this one:

    device --copy--> pinned --gloo--> pinned --copy--> device

With NIXL the same goes through memory that it registered, of the host or of the device (`nixl_group`).

The background thread does all of it. It waits for the device by looking at marks, with a time-out of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol, TypeAlias

import torch

from eplb_backends.accelerator.messages import check_messages
from eplb_backends.accelerator.streams import wait_on_host
from eplb_backends.accelerator.weights import DenseLayout
from eplb_platform.backend import GroupError, Message, StreamOperations

_QUIET_S = 1.0
"""How long a failed exchange, or an abort, waits for what the device has still to copy."""

Pieces: TypeAlias = "list[torch.Tensor]"
"""uint8 [bytes] each, on the device; they follow each other in a pair's message."""


class HostGroup(Protocol):
    """What carries the messages between the pinned memories; as `GlooGroup`, `NixlGroup`."""

    @property
    def is_closed(self) -> bool: ...

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], timeout_s: float) -> None: ...


@dataclass
class _Half:
    """Pinned memory for one round: uint8 [pair bytes] for each peer, out and in."""

    outgoing: Mapping[int, torch.Tensor]
    incoming: Mapping[int, torch.Tensor]
    filled: object = None
    """After the device's copies into `outgoing`, and with them after those out of `incoming` before."""


@dataclass
class _Received:
    tensor: torch.Tensor
    octets: torch.Tensor = field(repr=False)


class HostTransfer:
    """The way of one rank's weights. `exchange` comes from one thread at a time, `stop` from any.

    pinned_bytes: host memory to use. A round carries a quarter of it, divided by the number of peers; the
        same on every rank.
    allocate: gives uint8 [bytes] that the device can copy to and from without synchronising
    """

    def __init__(
        self,
        streams: StreamOperations,
        layout: DenseLayout,
        *,
        device_type: str,
        rank: int,
        num_ranks: int,
        pinned_bytes: int,
        allocate: Callable[[int], torch.Tensor],
    ) -> None:
        self._streams = streams
        self._layout = layout
        self._device_type = device_type
        self._rank = rank
        self._peers = [peer for peer in range(num_ranks) if peer != rank]
        self._pair_bytes = pinned_bytes // (4 * max(len(self._peers), 1))
        if self._pair_bytes < 1:
            raise ValueError(f"{pinned_bytes} bytes of pinned memory are too few for {num_ranks} ranks")
        self._halves = [_Half(self._pinned(allocate), self._pinned(allocate)) for _ in range(2)]
        self._lock = Lock()
        self._written: object | None = None
        """After the device's last copies into tensors that were given to receive into."""

    def exchange(
        self, group: HostGroup, sends: Sequence[Message], receives: Sequence[Message], timeout_s: float
    ) -> None:
        """As `Backend.exchange`; nothing is left for the device to copy when it fails."""
        deadline = time.monotonic() + timeout_s
        check_messages([*sends, *receives], rank=self._rank, peers=self._peers, device_type=self._device_type)
        try:
            departing = _rounds(self._pair_bytes, self._sent(sends))
            received = {
                peer: [_Received(tensor, self._layout.to_fill(tensor)) for tensor in tensors]
                for peer, tensors in _by_peer(receives).items()
            }
            arriving = _rounds(
                self._pair_bytes, {peer: [item.octets for item in items] for peer, items in received.items()}
            )
            self._run(group, departing, arriving, deadline)
            self._land(group, [item for items in received.values() for item in items])
        except BaseException:
            self._quiet()
            raise

    def stop(self) -> None:
        """No tensor given to `exchange` is written once this has returned. Its group is closed already."""
        with self._lock:
            written = self._written
        if written is not None:
            wait_on_host(self._streams, written, time.monotonic() + _QUIET_S)

    # --- rounds ---

    def _run(
        self,
        group: HostGroup,
        departing: Sequence[Mapping[int, Pieces]],
        arriving: Sequence[Mapping[int, Pieces]],
        deadline: float,
    ) -> None:
        num_rounds = max(len(departing), len(arriving))
        departing = [*departing, *({} for _ in range(num_rounds - len(departing)))]
        arriving = [*arriving, *({} for _ in range(num_rounds - len(arriving)))]
        if num_rounds == 0:
            group.exchange([], [], _left(deadline))  # a closed group says so
            return
        self._fill(self._halves[0], departing[0])
        for number in range(num_rounds):
            half = self._halves[number % 2]
            if number + 1 < num_rounds:  # gloo has sent what the other half held: its exchange has returned
                self._fill(self._halves[(number + 1) % 2], departing[number + 1])
            self._await(half, deadline)
            group.exchange(
                _messages(half.outgoing, departing[number]),
                _messages(half.incoming, arriving[number]),
                _left(deadline),
            )
            self._write(group, half, arriving[number])

    def _fill(self, half: _Half, pieces_of: Mapping[int, Pieces]) -> None:
        for peer, pieces in pieces_of.items():
            for piece, place in _placed(pieces, half.outgoing[peer]):
                self._streams.copy(place, piece)
        half.filled = self._streams.record()

    def _write(self, group: HostGroup, half: _Half, pieces_of: Mapping[int, Pieces]) -> None:
        with self._lock:
            self._check_open(group)
            try:
                for peer, pieces in pieces_of.items():
                    for piece, place in _placed(pieces, half.incoming[peer]):
                        self._streams.copy(piece, place)
            finally:
                self._written = self._streams.record()

    def _land(self, group: HostGroup, received: Sequence[_Received]) -> None:
        """Bring what could not be received in place to where it belongs."""
        with self._lock:
            self._check_open(group)
            try:
                for item in received:
                    self._layout.fill(self._streams, item.tensor, item.octets)
            finally:
                self._written = self._streams.record()

    def _await(self, half: _Half, deadline: float) -> None:
        """Gloo sends from the half, and receives into it, next: the device must be done with both."""
        if not wait_on_host(self._streams, half.filled, deadline):
            raise GroupError(f"rank {self._rank}: exchange: the device did not copy to host memory in time")

    def _quiet(self) -> None:
        """The caller may free its tensors, or overwrite them: let the device finish what was enqueued."""
        wait_on_host(self._streams, self._streams.record(), time.monotonic() + _QUIET_S)

    # --- what is given ---

    def _sent(self, sends: Sequence[Message]) -> Mapping[int, Pieces]:
        return {
            peer: [self._layout.to_send(self._streams, tensor) for tensor in tensors]
            for peer, tensors in _by_peer(sends).items()
        }

    def _check_open(self, group: HostGroup) -> None:
        if group.is_closed:
            raise GroupError(f"rank {self._rank}: exchange: the group was closed on this rank")

    def _pinned(self, allocate: Callable[[int], torch.Tensor]) -> Mapping[int, torch.Tensor]:
        if not self._peers:
            return {}
        memory = allocate(self._pair_bytes * len(self._peers))
        return dict(zip(self._peers, memory.split(self._pair_bytes), strict=True))


def _by_peer(messages: Sequence[Message]) -> Mapping[int, list[torch.Tensor]]:
    tensors: dict[int, list[torch.Tensor]] = {}
    for message in messages:
        tensors.setdefault(message.peer, []).append(message.tensor)
    return tensors


def _rounds(room: int, octets_of: Mapping[int, Pieces]) -> list[dict[int, Pieces]]:
    """[round][peer]: pieces of `room` bytes together, all but the last round's."""
    rounds: list[dict[int, Pieces]] = []
    for peer, octets in octets_of.items():
        for number, pieces in enumerate(_cut(room, octets)):
            if number == len(rounds):
                rounds.append({})
            rounds[number][peer] = pieces
    return rounds


def _cut(room: int, octets: Pieces) -> list[Pieces]:
    rounds: list[Pieces] = []
    left = 0
    for whole in octets:
        start = 0
        while start < whole.numel():
            if left == 0:
                rounds.append([])
                left = room
            piece = whole[start : start + left]
            rounds[-1].append(piece)
            start, left = start + piece.numel(), left - piece.numel()
    return rounds


def _placed(pieces: Pieces, memory: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(piece, where it lies in `memory`), one behind the other."""
    places = memory[: _nbytes(pieces)].split([piece.numel() for piece in pieces])
    return list(zip(pieces, places, strict=True))


def _messages(memory_of: Mapping[int, torch.Tensor], pieces_of: Mapping[int, Pieces]) -> list[Message]:
    return [Message(peer, memory_of[peer][: _nbytes(pieces)]) for peer, pieces in pieces_of.items()]


def _nbytes(pieces: Pieces) -> int:
    return sum(piece.numel() for piece in pieces)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)
