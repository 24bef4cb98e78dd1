"""One gloo group for one epoch: the ranks meet, exchange tensors, and end together when one of them fails.

What gloo does and what follows from it (read in its TCP transport, and measured):

- A wait that times out closes every connection of its rank for good, and the peers see them close. That is
  how a group is closed here: nothing is written into a tensor afterwards.
- A message that is half sent or half received when its connection closes wakes nobody who waits for it. So
  nobody waits for one: behind the messages of a pair comes an empty one, and an empty answer goes back. An
  empty message is never half received, and once it is here, everything before it is complete.
- A message longer than its receiver expects ends the process. So the tag is made from length and place:
  messages that do not belong together never meet, they time out.
"""

from __future__ import annotations

import re
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Event, Lock
from typing import Protocol, TypeVar, cast

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, Work

from eplb_platform.backend import GroupError, Message

_POLL_S = 0.005
_CONTROL = 1 << 30
"""Tags from here on are the group's own; messages have those below."""
_NEVER_SENT = _CONTROL - 1

Result = TypeVar("Result")


class _Gloo(Protocol):
    """What is used of `ProcessGroupGloo`, whose stub lacks these."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> Work: ...


class GlooGroup:
    """The ranks of one epoch. All methods but `close` are called from one thread at a time.

    ranks: who is in the group, ascending, `rank` among them; peers of messages are named by these numbers
    """

    def __init__(self, store: Store, rank: int, ranks: Sequence[int], epoch: int) -> None:
        self.peers = [peer for peer in ranks if peer != rank]
        self._place = {member: place for place, member in enumerate(ranks)}
        self._store = PrefixStore(f"eplb/{epoch}", store)
        self._rank = rank
        self._closed = Event()
        self._lock = Lock()
        self._gloo: _Gloo | None = None
        self._answers: dict[int, Work] = {}
        self._exchanges_to: Counter[int] = Counter()
        self._exchanges_from: Counter[int] = Counter()

    @property
    def is_closed(self) -> bool:
        """Whether the group has ended on this rank."""
        return self._closed.is_set()

    def join(self, timeout_s: float) -> None:
        """Meet the other ranks and connect to each of them."""
        deadline = time.monotonic() + timeout_s
        self.meet("join", timeout_s)
        place, size = self._place[self._rank], len(self._place)
        gloo = self._attempt("connecting", _gloo, self._store, place, size, _left(deadline))
        with self._lock:
            self._gloo = gloo
        if self._closed.is_set():
            self.close()
            raise GroupError(f"rank {self._rank}: the group was closed while it was being connected")

    def meet(self, purpose: str, timeout_s: float) -> None:
        """Wait on the store until every rank is here.

        Unlike gloo's own rendezvous this ends when the group is closed, and knows who is missing.
        """
        deadline = time.monotonic() + timeout_s
        keys = {rank: f"{purpose}/{rank}" for rank in self._place}
        self._attempt(purpose, self._store.set, keys[self._rank], "here")
        while not self._attempt(purpose, self._store.check, list(keys.values())):
            if self._closed.wait(_POLL_S):
                raise GroupError(f"rank {self._rank}: {purpose}: the group was closed on this rank")
            if time.monotonic() > deadline:
                missing = [
                    rank for rank, key in keys.items() if not self._attempt(purpose, self._store.check, [key])
                ]
                if not missing:  # the last one came since
                    return
                self.close()
                raise GroupError(
                    f"rank {self._rank}: {purpose}: no sign of ranks {missing} within {timeout_s} s"
                )

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], timeout_s: float) -> None:
        """As `Backend.exchange`. All messages are on their way before the first is waited for."""
        deadline = time.monotonic() + timeout_s
        gloo = self._gloo
        if gloo is None:
            raise GroupError(f"rank {self._rank}: the group is closed; rebuild it before its next use")
        self._check([*sends, *receives])
        outgoing = [Message(message.peer, message.tensor.detach().contiguous()) for message in sends]
        incoming = [Message(message.peer, _landing_place(message.tensor)) for message in receives]
        self._transfer(gloo, outgoing, incoming, deadline)
        with self._lock:  # so that no tensor is written once close() has returned
            if self._closed.is_set():
                raise GroupError(f"rank {self._rank}: exchange: the group was closed on this rank")
            for message, landed in zip(receives, incoming, strict=True):
                if not message.tensor.is_contiguous():
                    message.tensor.detach().copy_(landed.tensor)

    def close(self) -> None:
        """End everything that is pending here and on the peers. Nothing is received after this returns."""
        with self._lock:
            self._closed.set()
            gloo, self._gloo = self._gloo, None
        if gloo is not None:
            _close_connections(gloo, [self._place[peer] for peer in self.peers])

    def _check(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message.peer not in self.peers:
                raise ValueError(
                    f"rank {self._rank}: a message has peer {message.peer}; expected one of the other ranks "
                    f"{self.peers} (copies on the rank itself are the caller's)"
                )
            if message.tensor.device.type != "cpu":
                raise ValueError(
                    f"rank {self._rank}: the tensor for rank {message.peer} is on {message.tensor.device}, "
                    "expected cpu: choose the backend of that device"
                )

    def _transfer(
        self, gloo: _Gloo, outgoing: Sequence[Message], incoming: Sequence[Message], deadline: float
    ) -> None:
        """Post receives first, so that no sender waits for them; then sends; then wait for both ends."""
        sources = {message.peer: self._exchanges_from[message.peer] for message in incoming}
        targets = {message.peer: self._exchanges_to[message.peer] for message in outgoing}

        def receive(peer: int, tensor: torch.Tensor, tag: int) -> Work:
            return self._attempt(f"receiving from rank {peer}", gloo.recv, [tensor], self._place[peer], tag)

        def send(peer: int, tensor: torch.Tensor, tag: int) -> Work:
            return self._attempt(f"sending to rank {peer}", gloo.send, [tensor], self._place[peer], tag)

        arriving = [(post[0], receive(*post)) for post in _with_tags(incoming, sources)]
        ends = [(peer, receive(peer, _empty(), _end_tag(number))) for peer, number in sources.items()]
        answers = [(peer, receive(peer, _empty(), _answer_tag(number))) for peer, number in targets.items()]
        leaving = [(post[0], send(*post)) for post in _with_tags(outgoing, targets)]
        leaving += [(peer, send(peer, _empty(), _end_tag(number))) for peer, number in targets.items()]
        for peer, work in (*ends, *arriving):
            self._attempt(f"receiving from rank {peer}", work.wait, _left(deadline))
        # An answer is not waited for, as it may be half sent. It is kept until the peer's next end shows that
        # it has arrived: gloo sends nothing behind a message that was dropped.
        for peer, number in sources.items():
            self._answers[peer] = send(peer, _empty(), _answer_tag(number))
        for peer, work in (*answers, *leaving):
            self._attempt(f"sending to rank {peer}", work.wait, _left(deadline))
        self._exchanges_from.update(sources.keys())
        self._exchanges_to.update(targets.keys())

    def _attempt(self, what: str, operation: Callable[..., Result], *arguments: object) -> Result:
        """Call into gloo or the store; on failure close the group, so that the peers fail at once too."""
        try:
            return operation(*arguments)
        except RuntimeError as error:
            reason = "the group was closed on this rank" if self._closed.is_set() else _first_sentence(error)
            self.close()
            raise GroupError(f"rank {self._rank}: {what}: {reason}") from error


def _gloo(store: Store, rank: int, num_ranks: int, timeout: timedelta) -> _Gloo:
    return cast(_Gloo, ProcessGroupGloo(store, rank, num_ranks, timeout))


def _close_connections(gloo: _Gloo, places: Sequence[int]) -> None:
    """Wait for what nobody sends: when that times out, gloo closes all connections of this rank."""
    for peer in places:  # one of them is enough, unless its connection is closed already
        with suppress(RuntimeError):
            gloo.recv([_empty()], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))


def _landing_place(tensor: torch.Tensor) -> torch.Tensor:
    """Where bytes can be received: the tensor itself if they lie together in it."""
    if tensor.is_contiguous():
        return tensor.detach()
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _left(deadline: float) -> timedelta:
    """Time until `deadline`; never zero, which to gloo means for ever."""
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def _with_tags(
    messages: Sequence[Message], exchanges: Mapping[int, int]
) -> Iterator[tuple[int, torch.Tensor, int]]:
    """Each message's peer, tensor and tag.

    `exchanges` counts those of each pair: no message left over from an earlier one is taken for one of this.
    """
    places: Counter[int] = Counter()
    for message in messages:
        place = struct.pack("<3q", exchanges[message.peer], places[message.peer], message.tensor.nbytes)
        places[message.peer] += 1
        yield message.peer, message.tensor, zlib.crc32(place) % _NEVER_SENT


def _end_tag(exchange: int) -> int:
    return _CONTROL + 2 * (exchange % (_CONTROL // 2))


def _answer_tag(exchange: int) -> int:
    return _end_tag(exchange) + 1


def _first_sentence(error: RuntimeError) -> str:
    """Gloo's message without the place in its source and without its advice."""
    return re.sub(r"^\[[^ ]*\.cc:\d+\] ", "", str(error)).partition("\n")[0].partition(". ")[0]
