"""The part of a backend that is the same on every accelerator."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import ClassVar

import numpy as np
import torch
from torch.distributed import PrefixStore, Store

from eplb_backends.accelerator import nixl_group, nixl_library, routing, weights
from eplb_backends.accelerator.collective_transfer import CollectiveTransfer, DeviceGroup
from eplb_backends.accelerator.host_transfer import HostGroup, HostTransfer
from eplb_backends.accelerator.nixl_group import NixlGroup, Rooms
from eplb_backends.accelerator.streams import wait_on_host
from eplb_backends.accelerator.transports import AUTO, TRANSPORTS, choose_transport
from eplb_backends.accelerator.weights import DenseLayout
from eplb_backends.cpu.gloo_backend import GlooBackend
from eplb_platform.backend import GroupError, Message, PreparedExchange, StreamOperations

_log = logging.getLogger(__name__)

PINNED_BYTES = 128 * 2**20
"""Host memory through which a rank's weights pass."""

_CHECKSUM_BYTES = 4 * 2**20
_CHECKSUM_TIMEOUT_S = 30.0

_WATCHDOG_S = 1800.0
_WATCHDOG_TIMEOUTS = 10.0


class AcceleratorBackend(GlooBackend):
    """Weights in device memory. A device family adds its name, versions, streams, memory and timer.

    Made on the forward thread, with the model's device as the current one.
    transport: how weights move between ranks, one of `TRANSPORTS`, or "auto"; the same on every rank
    pinned_bytes: host memory for "host", allocated by `connect`; the same on every rank. "nixl" takes as
        much, of the device where `nixl_reads_device`
    """

    collective = "nixl" if nixl_library.is_installed() else "gloo"
    device_collective: ClassVar[str | None] = None
    """What the transport "collective" uses: nccl, hccl; None where there is nothing."""
    nixl_reads_device: ClassVar[bool] = False
    """Whether NIXL reads and writes the device's memory; else host memory is between."""
    layout: ClassVar[DenseLayout] = DenseLayout()
    """Where the bytes of a weight are."""

    def __init__(
        self,
        streams: StreamOperations | None = None,
        *,
        transport: str = AUTO,
        pinned_bytes: int = PINNED_BYTES,
    ) -> None:
        self.transport = choose_transport(self.name, transport, device_collective=self.device_collective)
        super().__init__(streams)
        if type(pinned_bytes) is not int or pinned_bytes < 1:
            raise ValueError(f"{self.name}: pinned_bytes is {pinned_bytes!r}, expected an integer from 1")
        self._pinned_bytes = pinned_bytes
        self._transfer: HostTransfer | None = None
        self._rooms: list[torch.Tensor] = []
        """What `_transfer` goes through."""
        self._nixl_group: NixlGroup | None = None
        self._unquiet: list[NixlGroup] = []
        """Closed ones whose reads may still write into their rooms."""
        self._may_go_by_host = self.transport == AUTO
        self._why_not_nixl = (
            f"transport {transport!r}" if transport != AUTO else "NIXL is not installed, transport 'auto'"
        )
        self.collective = "gloo" if self.transport == "host" else "nixl"
        self._collective_transfer: CollectiveTransfer | None = None
        if self.transport == "collective" and self.device_collective is not None:
            self.collective = self.device_collective
            self.enqueues_on_forward = True
        self._checksum_room: torch.Tensor | None = None

    # --- the group ---

    def attach(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        """As `Backend.attach`; also allocates the pinned memory, which could stop the device later on."""
        super().attach(store, rank, num_ranks, timeout_s)
        if self.enqueues_on_forward:
            self._collective_transfer = self._new_collective_transfer()
        else:
            self._transfer = self._new_transfer()
        self._room_for_checksums()

    def regroup(self, epoch: int, ranks: Sequence[int]) -> None:
        """As `Backend.regroup`. Raises `ValueError` for the transport "nixl" where a rank cannot go by it."""
        super().regroup(epoch, ranks)
        assert self._store is not None
        if self._goes_by_nixl:
            with self.streams.transfer():
                self._join_by_nixl(self._store, epoch, ranks)
        else:
            nixl_group.decline(self._store, self._rank, epoch, self._why_not_nixl)

    def _join_by_nixl(self, store: Store, epoch: int, ranks: Sequence[int]) -> None:
        self._unquiet = [group for group in self._unquiet if not group.is_quiet()]
        self._leave_nixl_group()
        group = NixlGroup(store, self._rank, ranks, epoch, Rooms(self._rooms))
        self._nixl_group = group
        control = self._open_group()
        try:
            group.join(self._timeout_s, is_given_up=lambda: control.is_closed)
        except nixl_group.Declined as declined:
            self._leave_nixl_group()
            if not self._may_go_by_host:
                self.abort()
                raise ValueError(f"rank {self._rank}: no transport 'nixl': {declined}") from declined
            self._go_by_host(str(declined))
            return
        except GroupError:
            self.abort()
            raise
        if control.is_closed:
            group.close()
            raise GroupError(f"rank {self._rank}: the group was closed while NIXL connected it")
        self.transport = "nixl"

    def _leave_nixl_group(self) -> None:
        """The rooms are used again unless a read may still write into them."""
        group, self._nixl_group = self._nixl_group, None
        if group is not None and not group.is_quiet():
            self._unquiet.append(group)
            self._transfer = self._new_transfer()

    def _go_by_host(self, reason: str) -> None:
        """For good, as other ranks are told the same."""
        level = logging.WARNING if self._rank == self._ranks[0] else logging.INFO
        _log.log(
            level, "%s: weights go through gloo, as NIXL cannot be used on every rank: %s", self.name, reason
        )
        self.transport, self.collective, self._why_not_nixl = "host", "gloo", reason
        if self.nixl_reads_device:
            self._transfer = self._new_transfer()

    @property
    def _goes_by_nixl(self) -> bool:
        return self.transport in ("nixl", AUTO)

    def warm_up(self) -> None:
        """As `Backend.warm_up`. Raises `ValueError` where rank 0 was given another transport, or other
        `pinned_bytes`.
        """
        names = list(TRANSPORTS)
        given = np.array([names.index(self.transport), self._pinned_bytes], np.int64)
        transport, pinned_bytes = self.broadcast_on_host(given, source=0).tolist()
        fault = ""
        if names[transport] != self.transport:
            fault = f"transport is {self.transport!r}, but {names[transport]!r} on rank 0"
        elif pinned_bytes != self._pinned_bytes:
            fault = (
                f"pinned_bytes is {self._pinned_bytes}, but {pinned_bytes} on rank 0: the rounds of an "
                "exchange would differ"
            )
        if fault:
            self.abort()
            raise ValueError(f"rank {self._rank}: {fault}")
        super().warm_up()
        if self.enqueues_on_forward:
            self.open_exchange(self._epoch)

    def abort(self) -> None:
        super().abort()  # first, as it ends what the background thread waits for
        if self._nixl_group is not None:
            self._nixl_group.close()
        if self._transfer is not None:
            self._transfer.stop()
        if self._collective_transfer is not None:
            self._collective_transfer.stop()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        group: HostGroup = self._open_group() if self._nixl_group is None else self._nixl_group
        if self._collective_transfer is not None:
            self._collective_transfer.prepare(sends, receives).enqueue()
            self._collective_transfer.wait("exchange", self._timeout_s)
        elif self._transfer is not None:
            self._transfer.exchange(group, sends, receives, self._timeout_s)
        else:
            raise GroupError("the backend is not connected: connect comes first")

    def open_exchange(self, epoch: int) -> None:
        """As `Backend.open_exchange`. The ranks meet on the store first, so that none waits in the library
        for one that does not come.
        """
        self.streams.check_not_capturing()
        group, way = self._open_group(), self._collective_transfer
        if way is None or self._store is None:
            raise GroupError(f"rank {self._rank}: transport {self.transport!r} has no group of the device's")
        group.meet("open exchange", self._timeout_s)
        store = PrefixStore(f"eplb/{epoch}/{self.collective}", self._store)
        way.open(self._new_device_group(store), self._ranks, self._timeout_s)

    def prepare_exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> PreparedExchange:
        if self._collective_transfer is None:
            raise GroupError("the backend is not connected: connect comes first")
        return self._collective_transfer.prepare(sends, receives)

    # --- weights ---

    def allocate_staging(
        self, parameter: Sequence[torch.Tensor] | torch.Tensor, slots: int
    ) -> Sequence[torch.Tensor]:
        return weights.allocate_staging(parameter, slots)

    def swap_in(
        self,
        parameter: Sequence[torch.Tensor] | torch.Tensor,
        slots: Sequence[int],
        staging: Sequence[torch.Tensor],
        rows: Sequence[int],
    ) -> None:
        weights.swap_in(self.streams, parameter, slots, staging, rows)

    def checksum(self, tensors: Sequence[torch.Tensor]) -> int:
        """As `Backend.checksum`. Waits for the device on the calling thread: never the forward one."""
        room = self._room_for_checksums()
        return weights.checksum(
            self.streams, self.layout, tensors, room, self._timeout_s or _CHECKSUM_TIMEOUT_S
        )

    # --- the forward path ---

    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        return routing.map_and_record(logical_ids, logical_to_physical, replica_count, load, offset)

    def _new_device_group(self, store: Store) -> DeviceGroup:
        """A group of the device's collective library for `_ranks`, which it counts from 0; not used yet.

        Forward thread, with the model's device as the current one. `store` is new. For backends that have a
        `device_collective`.
        """
        raise NotImplementedError(f"{self.name} lacks _new_device_group")

    @property
    def _place(self) -> tuple[int, int]:
        """(rank, size) as the device's group counts."""
        return self._ranks.index(self._rank), len(self._ranks)

    @property
    def _watchdog_timeout(self) -> timedelta:
        """For a device group whose watchdog ends the process: our own time-out comes first, always."""
        return timedelta(seconds=max(_WATCHDOG_S, _WATCHDOG_TIMEOUTS * self._timeout_s))

    def _new_collective_transfer(self) -> CollectiveTransfer:
        return CollectiveTransfer(
            self.streams,
            self.layout,
            device_type=self.device_type,
            rank=self._rank,
        )

    def _new_transfer(self) -> HostTransfer:
        self._rooms = []
        return HostTransfer(
            self.streams,
            self.layout,
            device_type=self.device_type,
            rank=self._rank,
            num_ranks=self._num_ranks,
            pinned_bytes=self._pinned_bytes,
            allocate=self._allocate_room,
        )

    def _room_for_checksums(self) -> torch.Tensor:
        if self._checksum_room is None:
            self._checksum_room = self._allocate_octets(_CHECKSUM_BYTES)
        return self._checksum_room

    def _allocate_room(self, nbytes: int) -> torch.Tensor:
        if self._goes_by_nixl and self.nixl_reads_device:
            room = torch.empty(nbytes, dtype=torch.uint8, device=self.device_type)
            self._await_former_owner()
        else:
            room = self._allocate_octets(nbytes)
        self._rooms.append(room)
        return room

    def _await_former_owner(self) -> None:
        """What the allocator gives may still be written on this stream; peers do not wait for that."""
        if not wait_on_host(self.streams, self.streams.record(), time.monotonic() + self._timeout_s):
            raise GroupError(f"rank {self._rank}: the device was not done within {self._timeout_s:g} s")

    def _allocate_octets(self, nbytes: int) -> torch.Tensor:
        return self.allocate_on_host((nbytes,), torch.uint8)
