"""A simulated collective library between the simulated accelerators of several ranks, each a real process.

What a rank enqueues runs later, in its stream's order, and waits there for its peers. Like NCCL's, messages
of a pair meet in the order in which they are enqueued, and a batch that a peer never enqueues holds up the
stream for ever, until it is aborted. What an aborted batch would have received is overwritten with garbage,
as a device may have been writing.

Messages pass through a store, and slowly. This cannot show how a real library fails, nor that it
makes progress beside the model's operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from threading import Event, Lock
from typing import TypeAlias

import torch
from torch.distributed import PrefixStore, Store

from eplb_platform.backend import Message
from eplb_platform.testing.simulated_accelerator import SimulatedStreams

_GARBAGE = 0xA5
_PART_BYTES = 4 * 2**20
"""A store takes no more than 8 MiB at once."""

Part: TypeAlias = tuple[str, torch.Tensor]
"""The key under which a message's bytes travel, and where they lie: uint8."""


class SimulatedCollective:
    """One rank's end of one group."""

    def __init__(self, streams: SimulatedStreams, store: Store, rank: int) -> None:
        self._streams = streams
        self._store = PrefixStore("simulated", store.clone())  # type: ignore[attr-defined]  # not in stubs
        self._rank = rank
        self._lock = Lock()
        self._is_aborted = Event()
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Enqueue one batch on the current stream."""
        if self._is_aborted.is_set():
            raise RuntimeError("the group was aborted")
        self._streams.check_not_capturing()
        outgoing = [
            (f"{self._rank}/{message.peer}/{number}", part)
            for message, part, number in _numbered(sends, self._sent)
        ]
        incoming = [
            (f"{message.peer}/{self._rank}/{number}", part)
            for message, part, number in _numbered(receives, self._received)
        ]
        self._streams.launch(lambda: self._send(outgoing))
        self._streams.await_arrival(lambda: self._are_here(incoming))
        self._streams.launch(lambda: self._receive(incoming))

    def abort(self) -> None:
        """Let the streams go on. What has not been received by now never will be."""
        with self._lock:
            self._is_aborted.set()

    def _send(self, parts: Sequence[Part]) -> None:
        with self._lock:
            if self._is_aborted.is_set():
                return
            for key, part in parts:
                self._store.set(key, bytes(part.numpy()))  # type: ignore[arg-type]  # the stub: text only

    def _are_here(self, parts: Sequence[Part]) -> bool:
        with self._lock:
            return self._is_aborted.is_set() or not parts or self._store.check([key for key, _ in parts])

    def _receive(self, parts: Sequence[Part]) -> None:
        with self._lock:
            for key, part in parts:
                if self._is_aborted.is_set():
                    part.fill_(_GARBAGE)
                    continue
                octets = bytearray(self._store.get(key))
                self._store.delete_key(key)
                if len(octets) != part.numel():
                    raise RuntimeError(
                        f"rank {self._rank}: {key}: {len(octets)} bytes came instead of {part.numel()}: the "
                        "ranks enqueued different batches"
                    )
                part.copy_(torch.frombuffer(octets, dtype=torch.uint8))


def _numbered(
    messages: Sequence[Message], counter: Counter[int]
) -> Iterator[tuple[Message, torch.Tensor, int]]:
    """Each message's bytes in parts, with the place of a part among all of the pair."""
    for message in messages:
        for part in message.tensor.detach().view(-1).view(torch.uint8).split(_PART_BYTES):
            counter[message.peer] += 1
            yield message, part, counter[message.peer]
