"""What every backend shares whose ranks talk in host memory: one gloo group after the other, its sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import Store

from eplb_backends.cpu.group import GlooGroup
from eplb_platform.backend import Backend, GroupError, Message, StreamOperations


class GlooBackend(Backend):
    """The group's life and the arrays between ranks. `exchange` takes tensors in host memory."""

    def __init__(self, streams: StreamOperations | None = None) -> None:
        super().__init__(streams)
        self._group: GlooGroup | None = None
        self._store: Store | None = None
        self._rank = 0
        self._num_ranks = 1
        self._ranks: Sequence[int] = range(1)
        self._timeout_s = 0.0
        self._epoch = -1

    # --- the group ---

    def connect(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        self.attach(store, rank, num_ranks, timeout_s)
        self.rebuild(epoch=0)

    def attach(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        """As `Backend.attach`. Uses its own client of the store, so that no other thread waits for it."""
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} is not one of {num_ranks} ranks")
        if timeout_s <= 0:
            raise ValueError(f"the time-out must be positive, got {timeout_s} s")
        if self._store is not None:
            raise GroupError(f"rank {rank}: connect was called twice; rebuild replaces a group")
        self._store = store.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
        self._rank, self._num_ranks, self._timeout_s = rank, num_ranks, timeout_s
        self._ranks = range(num_ranks)

    def warm_up(self) -> None:
        self._touch_pairs()
        self._open_group().meet("warm up", self._timeout_s)

    def _touch_pairs(self) -> None:
        group = self._open_group()
        byte = torch.zeros(1, dtype=torch.uint8)
        group.exchange(
            [Message(peer, byte) for peer in group.peers],
            [Message(peer, byte.clone()) for peer in group.peers],
            self._timeout_s,
        )

    def abort(self) -> None:
        group = self._group
        if group is not None:
            group.close()

    def rebuild(self, epoch: int) -> None:
        self.regroup(epoch, self._ranks)

    def regroup(self, epoch: int, ranks: Sequence[int]) -> None:
        if self._store is None:
            raise GroupError("connect comes before rebuild, and close after it")
        if epoch <= self._epoch:
            raise ValueError(
                f"rank {self._rank}: epoch {epoch} was used: rebuild needs one above {self._epoch}"
            )
        self.abort()
        if self._rank not in ranks:
            raise ValueError(f"rank {self._rank} is not one of the ranks {list(ranks)} of its group")
        self._epoch = epoch
        self._group = GlooGroup(self._store, self._rank, ranks, epoch)
        self._group.join(self._timeout_s)
        self._ranks = ranks

    def close(self) -> None:
        self.abort()
        self._group = self._store = None

    def _open_group(self) -> GlooGroup:
        if self._group is None:
            raise GroupError("the backend is not connected: connect comes first, and nothing after close")
        return self._group

    # --- what the background thread sends ---

    def sum_on_host(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `Backend.sum_on_host`. Each rank sums its part of the array for all, as in a reduce-scatter."""
        group = self._open_group()
        split = np.array_split(_as_int64(values).ravel(), len(self._ranks))
        parts = dict(zip(self._ranks, split, strict=True))
        own = np.array(parts[self._rank])
        shares = np.empty((len(group.peers), own.size), np.int64)
        group.exchange(
            [_message(peer, parts[peer]) for peer in group.peers],
            [_message(peer, share) for peer, share in zip(group.peers, shares, strict=True)],
            self._timeout_s,
        )
        own += shares.sum(axis=0)
        sums = {rank: own if rank == self._rank else np.empty_like(part) for rank, part in parts.items()}
        group.exchange(
            [_message(peer, own) for peer in group.peers],
            [_message(peer, sums[peer]) for peer in group.peers],
            self._timeout_s,
        )
        return np.concatenate(list(sums.values())).reshape(values.shape)

    def broadcast_on_host(self, values: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        group = self._open_group()
        if source not in self._ranks:
            raise ValueError(
                f"rank {self._rank}: source {source} is not one of the ranks {list(self._ranks)}"
            )
        result = np.array(_as_int64(values), order="C")
        if source == self._rank:
            group.exchange([_message(peer, result) for peer in group.peers], [], self._timeout_s)
        else:
            group.exchange([], [_message(source, result)], self._timeout_s)
        return result

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self._open_group().exchange(sends, receives, self._timeout_s)


def _as_int64(values: NDArray[np.int64]) -> NDArray[np.int64]:
    if values.dtype != np.int64:
        raise ValueError(f"arrays between ranks are int64, got {values.dtype}")
    return values


def _message(peer: int, values: NDArray[np.int64]) -> Message:
    return Message(peer, torch.from_numpy(values))
