"""The part of a backend that is the same on every accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch.distributed import Store

from eplb_backends.accelerator import routing, weights
from eplb_backends.accelerator.host_transfer import HostTransfer
from eplb_backends.accelerator.weights import DenseLayout
from eplb_backends.cpu.gloo_backend import GlooBackend
from eplb_platform.backend import GroupError, Message, StreamOperations

PINNED_BYTES = 128 * 2**20
"""Host memory through which a rank's weights pass."""

_CHECKSUM_BYTES = 4 * 2**20
_CHECKSUM_TIMEOUT_S = 30.0

TRANSPORTS = {
    "host": "through pinned host memory and gloo, by the background thread",
    "nixl": "NIXL, by the background thread",
    "collective": "the device's collective library, enqueued by the forward thread at an agreed step",
}
"""Ways for weights to move between ranks; this release has the first only."""


class AcceleratorBackend(GlooBackend):
    """Weights in device memory. A device family adds its name, versions, streams, memory and timer.

    Made on the forward thread, with the model's device as the current one.
    transport: how weights move between ranks, one of `TRANSPORTS`
    pinned_bytes: host memory for it, allocated by `connect`; the same on every rank
    """

    layout: ClassVar[DenseLayout] = DenseLayout()
    """Where the bytes of a weight are."""

    def __init__(
        self,
        streams: StreamOperations | None = None,
        *,
        transport: str = "host",
        pinned_bytes: int = PINNED_BYTES,
    ) -> None:
        _check_transport(self.name, transport)
        super().__init__(streams)
        self._pinned_bytes = pinned_bytes
        self._transfer: HostTransfer | None = None
        self._checksum_room: torch.Tensor | None = None

    # --- the group ---

    def attach(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        """As `Backend.attach`; also allocates the pinned memory, which could stop the device later on."""
        super().attach(store, rank, num_ranks, timeout_s)
        self._transfer = self._new_transfer()
        self._room_for_checksums()

    def warm_up(self) -> None:
        """As `Backend.warm_up`. Raises `ValueError` where rank 0 was given other `pinned_bytes`."""
        given = np.array([self._pinned_bytes], np.int64)
        first = int(self.broadcast_on_host(given, source=0)[0])
        if first != self._pinned_bytes:
            self.abort()
            raise ValueError(
                f"rank {self._rank}: pinned_bytes is {self._pinned_bytes}, but {first} on rank 0: the rounds "
                "of an exchange would differ"
            )
        super().warm_up()

    def abort(self) -> None:
        super().abort()  # first, as it ends what the background thread waits for
        if self._transfer is not None:
            self._transfer.stop()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        group = self._open_group()
        if self._transfer is None:
            raise GroupError("the backend is not connected: connect comes first")
        self._transfer.exchange(group, sends, receives, self._timeout_s)

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

    def _new_transfer(self) -> HostTransfer:
        return HostTransfer(
            self.streams,
            self.layout,
            device_type=self.device_type,
            rank=self._rank,
            num_ranks=self._num_ranks,
            pinned_bytes=self._pinned_bytes,
            allocate=self._allocate_octets,
        )

    def _room_for_checksums(self) -> torch.Tensor:
        if self._checksum_room is None:
            self._checksum_room = self._allocate_octets(_CHECKSUM_BYTES)
        return self._checksum_room

    def _allocate_octets(self, nbytes: int) -> torch.Tensor:
        return self.allocate_on_host((nbytes,), torch.uint8)


def _check_transport(name: str, transport: str) -> None:
    if transport not in TRANSPORTS:
        raise ValueError(f"{name}: no transport {transport!r}; there are {', '.join(TRANSPORTS)}")
    if transport != "host":
        raise ValueError(
            f"{name}: transport {transport!r} ({TRANSPORTS[transport]}) is not in this release: use 'host'"
        )
