"""Weights on their way by the device's collective library: NCCL, HCCL and their like.

Its operations may not race the model's own, which are of another group on the same devices. So the forward
thread enqueues them, all of an exchange in one batch, at a boundary that all ranks agreed on; it is the same
place between the model's operations on every rank. It waits for nothing. The background thread prepares the
batch beforehand and looks at a mark afterwards, with a time-out of its own: the library's watchdog, whose
time-out is longer, would end the process.

The first operation of a group needs all ranks, and a pair's connection is made by its first message. So a
group is made, and every pair touched, while the forward threads of all ranks are here for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import torch

from eplb_backends.accelerator.messages import check_messages
from eplb_backends.accelerator.streams import wait_on_host
from eplb_backends.accelerator.weights import DenseLayout
from eplb_platform.backend import GroupError, Message, StreamOperations

_QUIET_S = 1.0
"""How long an abort waits for what the device has still to write."""


class DeviceGroup(Protocol):
    """The ranks as the device's collective library knows them."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Enqueue all of it as one batch, behind what the current stream holds and before what follows there.

        Forward thread, which waits for the other ranks at the group's first batch only. Raises RuntimeError.
        """
        ...

    def abort(self) -> None:
        """End what is enqueued, here and on the peers, or waits for them. Any thread, at any time."""
        ...


class CollectiveTransfer:
    """The way of one rank's weights, through one group after the other."""

    def __init__(
        self,
        streams: StreamOperations,
        layout: DenseLayout,
        *,
        device_type: str,
        rank: int,
    ) -> None:
        self._streams = streams
        self._layout = layout
        self._device_type = device_type
        self._rank = rank
        self._place_of: dict[int, int] = {}
        """Of each peer: its number in the group."""
        self._group: DeviceGroup | None = None
        self._aborted: list[DeviceGroup] = []
        self._lock = Lock()
        self._written: object | None = None
        """After the last operations that write into tensors that were given to receive into."""

    # --- forward thread ---

    def open(self, group: DeviceGroup, ranks: Sequence[int], timeout_s: float) -> None:
        """Go on with a new group of `ranks`, which are all here: touch every pair and wait for that."""
        self.stop()
        self._place_of = {rank: place for place, rank in enumerate(ranks) if rank != self._rank}
        with self._lock:
            self._group = group
        with self._streams.transfer():  # whose memory it is, too: it may be given back before it was written
            own, *others = torch.zeros(len(ranks), dtype=torch.uint8, device=self._device_type).split(1)
            sends = [Message(place, own) for place in self._place_of.values()]
            receives = [Message(*pair) for pair in zip(self._place_of.values(), others, strict=True)]
            self._enqueue(_Batch(sends, receives))
        self.wait("connecting the ranks", timeout_s)

    def wait(self, purpose: str, timeout_s: float) -> None:
        """Wait for what was enqueued: only where no model runs, or all ranks have come to wait."""
        if self._written is None or wait_on_host(self._streams, self._written, time.monotonic() + timeout_s):
            return
        self.stop()
        raise GroupError(f"rank {self._rank}: {purpose}: the device was not done within {timeout_s:g} s")

    # --- background thread ---

    def prepare(self, sends: Sequence[Message], receives: Sequence[Message]) -> PreparedBatch:
        """All that can be made ready; inside `streams.transfer()`."""
        check_messages(
            [*sends, *receives], rank=self._rank, peers=list(self._place_of), device_type=self._device_type
        )
        batch = _Batch([], [])
        for message in sends:
            room = self._room_for(message.tensor, batch.sends, message.peer)
            if room is not None:
                batch.before.append((room, message.tensor))
        for message in receives:
            room = self._room_for(message.tensor, batch.receives, message.peer)
            if room is not None:
                batch.after.append((message.tensor, room))
        return PreparedBatch(self, batch)

    # --- any thread ---

    def stop(self) -> None:
        """End the group. Nothing that was given to receive into is written once this has returned.

        Aborted groups are kept: the end of such an object waits for the device.
        """
        with self._lock:
            group, self._group = self._group, None
            if group is not None:
                self._aborted.append(group)
        if group is not None:
            group.abort()
        written = self._written
        if written is not None:
            wait_on_host(self._streams, written, time.monotonic() + _QUIET_S)

    def _enqueue(self, batch: _Batch) -> None:
        group = self._group
        if group is None:
            raise GroupError(f"rank {self._rank}: exchange: the group was closed on this rank")
        try:
            for target, source in batch.before:
                self._streams.copy(target, source)
            if batch.sends or batch.receives:
                group.exchange(batch.sends, batch.receives)
            for target, source in batch.after:
                self._streams.copy(target, source)
        except RuntimeError as error:
            raise GroupError(f"rank {self._rank}: exchange: {_one_line(error)}") from error
        finally:
            self._written = self._streams.record()

    def _room_for(self, tensor: torch.Tensor, messages: list[Message], peer: int) -> torch.Tensor | None:
        """Add the message; returns the contiguous memory that it goes through if it has to."""
        self._streams.keep(tensor)
        tensor, room = tensor.detach(), None
        given = self._layout.as_enqueued(tensor)
        if given is None:
            room = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            self._streams.keep(room)
            given = self._layout.as_enqueued(room)
            assert given is not None
        if given.numel():
            messages.append(Message(self._place_of[peer], given))
        return room


class _Batch:
    """Messages of one exchange, and the copies from and into tensors that do not lie together in memory."""

    def __init__(self, sends: list[Message], receives: list[Message]) -> None:
        self.sends = sends
        self.receives = receives
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.after: list[tuple[torch.Tensor, torch.Tensor]] = []


class PreparedBatch:
    """A `PreparedExchange`; good for one use."""

    def __init__(self, way: CollectiveTransfer, batch: _Batch) -> None:
        self._way = way
        self._batch = batch

    def enqueue(self) -> None:
        """As `PreparedExchange.enqueue`."""
        self._way._enqueue(self._batch)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
