"""The execution of a schedule on one rank: arriving experts into staging, at the commit into their slots."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from eplb_platform.backend import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from eplb_platform.backend import Backend
    from eplb_platform.migration.schedule import Chunk, RankMoves
    from eplb_platform.migration.staging import ExpertWeights, Parameter, Staging

Tensors: TypeAlias = "Sequence[torch.Tensor]"
"""The tensors of one expert, one for each parameter."""

LoadExpert: TypeAlias = "Callable[[int, int], Tensors]"
"""The weights of (layer, logical expert) from the model's checkpoint, as in `expert_weights`."""

_LOOK_AGAIN_S = 0.0005


class MigrationError(RuntimeError):
    """A chunk was handed over that cannot be executed now; no slot was changed."""


class ChecksumError(RuntimeError):
    """What a rank received is not what its sender read; the message names layer, expert and both ranks."""


@dataclass(frozen=True)
class _Staged:
    """A chunk that lies in staging, with all that its swap needs made ready in the background."""

    chunk: Chunk
    mark: object
    layers: Sequence[tuple[int, Sequence[int], Sequence[int]]]
    """(layer, slots, rows) of this rank."""
    received: int
    copied: int


class Migrator:
    """Moves the weights of one rank, chunk by chunk: `fetch` in the background, then `swap` at the commit.

    expert_weights: [layer][parameter], stacked [slots, ...] or one tensor per slot; overwritten in place, by
    `swap` only. A fetched chunk whose cycle ends without a commit is forgotten by the next `fetch`.
    verify: compare a checksum of every expert that another rank sent with the sender's own.
    Made on the forward thread and stream.
    """

    def __init__(
        self,
        backend: Backend,
        expert_weights: ExpertWeights,
        staging: Staging,
        rank: int,
        *,
        verify: bool = False,
    ) -> None:
        self._backend = backend
        self.staging = staging
        self._device = staging.buffers[0][0].device
        self._rank = rank
        self._verify = verify
        self._load_expert: LoadExpert | None = None
        self.follow(expert_weights)
        self.bytes_received = 0
        """Bytes of expert weights fetched from other ranks, whether they were committed or not."""
        self.experts_received = 0
        """Experts committed that came from another rank."""
        self.experts_copied = 0
        """Experts committed that came from another slot of this rank."""

    def load_with(self, load_expert: LoadExpert | None) -> None:
        """From where `fetch` takes experts whose chunk names no source: called with layer and expert."""
        self._load_expert = load_expert

    def follow(self, expert_weights: ExpertWeights) -> None:
        """The weights were loaded, perhaps into other tensors of the same shapes; what is staged is void.

        Forward thread and stream, while no `fetch` runs.
        """
        self._weights = [[_detached(parameter) for parameter in parameters] for parameters in expert_weights]
        self._staged: _Staged | None = None
        # What the forward stream did to the weights until now, their loading included, precedes any fetch.
        self._swapped = self._backend.streams.record()

    def fetch(self, chunk: Chunk) -> None:
        """Receive this rank's new experts of `chunk` into staging, and send what other ranks need.

        Background thread; every rank calls it with the same chunk, after its own `swap` of the one before.
        Slots keep their old weights. Raises GroupError, ChecksumError, and MigrationError when the staging is
        too small for the chunk.
        """
        self._staged = None
        arrivals = chunk.receives_of(self._rank)
        if len(arrivals) > self.staging.slots:
            raise MigrationError(
                f"rank {self._rank}: {len(arrivals)} experts arrive in one chunk of layers "
                f"{list(chunk.layers)}, but the staging holds {self.staging.slots}: build the schedule with "
                "that staging_slots"
            )
        streams = self._backend.streams
        with streams.transfer():
            streams.wait(self._swapped)
            copied = self._copy_within_rank(arrivals) + self._load(arrivals)
            self._exchange(arrivals, chunk.sends_of(self._rank))
            mark = streams.record()
        received = len(arrivals) - copied
        self.bytes_received += received * self.staging.expert_bytes
        self._staged = _Staged(chunk, mark, _by_layer(arrivals), received, copied)

    def await_staged(self, timeout_s: float) -> None:
        """Return once the device has done all that `fetch` enqueued: what is staged then cannot be late.

        Background thread, which looks at the mark again and again: nothing else ends when a device stops. Not
        needed for the order of `fetch` and `swap`. Raises MigrationError after `timeout_s` seconds.
        """
        staged = self._staged
        deadline = time.monotonic() + timeout_s
        while staged is not None and not self._backend.streams.passed(staged.mark):
            if time.monotonic() > deadline:
                raise MigrationError(
                    f"rank {self._rank}: layers {list(staged.chunk.layers)}: the device has not finished "
                    f"copying into the staging after {timeout_s:g} s"
                )
            time.sleep(_LOOK_AGAIN_S)

    def swap(self, chunk: Chunk) -> None:
        """Overwrite the slots that `chunk` changes with what `fetch` staged for them.

        Forward thread, on the forward stream, between two passes. Raises MigrationError when another chunk,
        or none, is staged.
        """
        staged = self._staged
        if staged is None or staged.chunk is not chunk:
            there = "nothing is" if staged is None else f"layers {list(staged.chunk.layers)} are"
            raise MigrationError(
                f"rank {self._rank}: swap of layers {list(chunk.layers)}, but {there} staged"
            )
        self._staged = None
        streams = self._backend.streams
        streams.wait(staged.mark)
        for layer, slots, rows in staged.layers:
            for parameter, buffers in zip(self._weights[layer], self.staging.buffers, strict=True):
                self._backend.swap_in(parameter, slots, buffers, rows)
        self._swapped = streams.record()
        self.experts_received += staged.received
        self.experts_copied += staged.copied

    def _expert(self, layer: int, slot: int) -> list[torch.Tensor]:
        return [parameter[slot] for parameter in self._weights[layer]]

    def _row(self, row: int) -> list[torch.Tensor]:
        return [buffers[row] for buffers in self.staging.buffers]

    def _copy_within_rank(self, arrivals: RankMoves) -> int:
        rows = np.flatnonzero(arrivals.peer == self._rank)
        local = arrivals[rows]
        moves = zip(rows.tolist(), local.layer.tolist(), local.peer_slot.tolist(), strict=True)
        for row, layer, slot in moves:
            for target, source in zip(self._row(row), self._expert(layer, slot), strict=True):
                self._backend.streams.copy(target, source)
        return len(rows)

    def _load(self, arrivals: RankMoves) -> int:
        """Take from the checkpoint what no rank has."""
        rows = np.flatnonzero(arrivals.peer < 0)
        for row, layer, expert in zip(
            rows.tolist(), arrivals.layer[rows].tolist(), arrivals.expert[rows].tolist(), strict=True
        ):
            if self._load_expert is None:
                raise MigrationError(f"layer {layer}: no rank has expert {expert}, and nothing loads it")
            loaded = list(self._load_expert(layer, expert))
            _check_loaded(loaded, self._row(row), f"layer {layer}, expert {expert}")
            for target, source in zip(self._row(row), loaded, strict=True):
                self._backend.streams.copy(target, source)
        return len(rows)

    def _exchange(self, arrivals: RankMoves, departures: RankMoves) -> None:
        """Both ends walk the moves in the chunk's order, so that the messages of every pair match."""
        rows = np.flatnonzero((arrivals.peer != self._rank) & (arrivals.peer >= 0))
        remote = arrivals[rows]
        places = zip(departures.layer.tolist(), departures.slot.tolist(), strict=True)
        experts = [self._expert(layer, slot) for layer, slot in places]
        staged = [self._row(row) for row in rows.tolist()]
        sends = _messages(departures.peer, experts)
        receives = _messages(remote.peer, staged)
        if self._verify:
            self._exchange_verified(sends, receives, departures.peer, experts, remote, staged)
        else:
            self._backend.exchange(sends, receives)

    def _exchange_verified(
        self,
        sends: Sequence[Message],
        receives: Sequence[Message],
        receivers: NDArray[np.int32],
        experts: Sequence[Tensors],
        remote: RankMoves,
        staged: Sequence[Tensors],
    ) -> None:
        """Each pair's last message carries the sender's checksums of all before it."""
        given = [Message(peer, self._checksums(experts, which)) for peer, which in _by_peer(receivers)]
        expected = [
            (Message(peer, torch.empty(len(which), dtype=torch.int64, device=self._device)), which)
            for peer, which in _by_peer(remote.peer)
        ]
        self._backend.exchange([*sends, *given], [*receives, *(message for message, _ in expected)])
        for message, which in expected:
            differs = (message.tensor != self._checksums(staged, which)).tolist()
            if any(differs):
                raise _checksum_error(self._rank, remote[which], differs)

    def _checksums(self, experts: Sequence[Tensors], which: NDArray[np.int64]) -> torch.Tensor:
        """int64 [which]"""
        checksums = [self._backend.checksum(experts[move]) for move in which.tolist()]
        return torch.tensor(checksums, dtype=torch.int64, device=self._device)


def _check_loaded(loaded: Tensors, staged: Tensors, where: str) -> None:
    found = [(tensor.dtype, tuple(tensor.shape)) for tensor in loaded]
    expected = [(tensor.dtype, tuple(tensor.shape)) for tensor in staged]
    if found != expected:
        raise MigrationError(f"{where}: what was loaded is {found}, expected {expected} as in expert_weights")


def _checksum_error(rank: int, moves: RankMoves, differs: Sequence[bool]) -> ChecksumError:
    first = differs.index(True)
    return ChecksumError(
        f"layer {moves.layer[first]}, logical expert {moves.expert[first]}: rank {rank} received other "
        f"weights than rank {moves.peer[first]} read ({sum(differs)} of {len(moves)} experts from that rank)"
    )


def _messages(peers: NDArray[np.int32], experts: Sequence[Tensors]) -> list[Message]:
    pairs = zip(peers.tolist(), experts, strict=True)
    return [Message(peer, tensor) for peer, expert in pairs for tensor in expert]


def _by_peer(peers: NDArray[np.int32]) -> list[tuple[int, NDArray[np.int64]]]:
    """(peer, positions of its moves), one for each peer."""
    return [(peer, np.flatnonzero(peers == peer)) for peer in np.unique(peers).tolist()]


def _by_layer(arrivals: RankMoves) -> list[tuple[int, list[int], list[int]]]:
    """(layer, slots, rows), one for each layer; row i is the i-th arrival."""
    layers = dict.fromkeys(arrivals.layer.tolist())
    rows_of = ((layer, np.flatnonzero(arrivals.layer == layer)) for layer in layers)
    return [(layer, arrivals.slot[rows].tolist(), rows.tolist()) for layer, rows in rows_of]


def _detached(parameter: Parameter) -> Parameter:
    """The same memory without autograd: it is copied on a thread that knows nothing of `torch.no_grad`."""
    if isinstance(parameter, torch.Tensor):
        return parameter.detach()
    return [tensor.detach() for tensor in parameter]
