"""A simulated collective library between the simulated accelerators of several ranks, each a real process.

What a rank enqueues runs later, in its stream's order, and waits there for its peers. Like NCCL's, a batch
has to be enqueued on all ranks in the same order, and one that a peer never enqueues holds up the stream for
ever, until it is aborted. What an aborted batch would have received is overwritten with garbage, as a device
may have been writing.

Messages pass through a store, and slowly. This cannot show how a real library fails, nor that it
makes progress beside the model's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event, Lock

import torch
from torch.distributed import PrefixStore, Store

from eplb_platform.backend import Message
from eplb_platform.testing.simulated_accelerator import SimulatedStreams

_GARBAGE = 0xA5
_PART_BYTES = 4 * 2**20
"""A store takes no more than 8 MiB at once."""


class SimulatedCollective:
    """One rank's end of one group."""

    def __init__(self, streams: SimulatedStreams, store: Store, rank: int, num_ranks: int) -> None:
        self._streams = streams
        self._store = PrefixStore("simulated", store.clone())  # type: ignore[attr-defined]  # not in stubs
        self._rank = rank
        self._num_ranks = num_ranks
        self._lock = Lock()
        self._is_aborted = Event()
        self.batches = 0
        """Enqueued so far."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Enqueue one batch on the current stream."""
        if self._is_aborted.is_set():
            raise RuntimeError("the group was aborted")
        self._streams.check_not_capturing()
        number, self.batches = self.batches, self.batches + 1
        self._streams.launch(lambda: self._send(number, sends))
        self._streams.await_arrival(lambda: self._are_here(number, receives))
        self._streams.launch(lambda: self._receive(number, receives))

    def abort(self) -> None:
        """Let the streams go on. What has not been received by now never will be."""
        with self._lock:
            self._is_aborted.set()

    def _send(self, number: int, sends: Sequence[Message]) -> None:
        with self._lock:
            if self._is_aborted.is_set():
                return
            for key, part in self._keyed(number, sends, outgoing=True):
                self._store.set(key, bytes(part.numpy()))  # type: ignore[arg-type]  # the stub: text only

    def _are_here(self, number: int, receives: Sequence[Message]) -> bool:
        with self._lock:
            keys = [key for key, _ in self._keyed(number, receives, outgoing=False)]
            return self._is_aborted.is_set() or not keys or self._store.check(keys)

    def _receive(self, number: int, receives: Sequence[Message]) -> None:
        with self._lock:
            for key, part in self._keyed(number, receives, outgoing=False):
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

    def _keyed(
        self, number: int, messages: Sequence[Message], *, outgoing: bool
    ) -> list[tuple[str, torch.Tensor]]:
        """Name and bytes of each part of a message, which both ends call by its place among the pair's."""
        places = [0] * self._num_ranks
        keyed = []
        for message in messages:
            source, target = (self._rank, message.peer) if outgoing else (message.peer, self._rank)
            for part in message.tensor.detach().view(-1).view(torch.uint8).split(_PART_BYTES):
                keyed.append((f"{number}/{source}/{target}/{places[message.peer]}", part))
                places[message.peer] += 1
        return keyed
