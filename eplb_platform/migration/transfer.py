"""The execution of a schedule on one rank: arriving experts into staging, at the commit into their slots."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from eplb_platform.backend import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from eplb_platform.backend import Backend, PreparedExchange
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
class _Arrivals:
    """What comes to this rank with a chunk, made ready in the background for the forward thread."""

    chunk: Chunk
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """(staging, weight), within the rank."""
    layers: Sequence[tuple[int, Sequence[int], Sequence[int]]]
    """(layer, slots, rows) of the swap."""
    received: int
    copied: int
    """Experts, from other ranks, and from this one or the checkpoint."""


class Migrator:
    """Moves the weights of one rank, chunk by chunk: `fetch` in the background, then `swap` at the commit.

    Where the forward thread has to enqueue exchanges, `prepare` in the background and `enqueue` on the
    forward thread take the place of `fetch` while the model serves.

    expert_weights: [layer][parameter], stacked [slots, ...] or one tensor per slot; overwritten in place, by
    `swap` only. A staged chunk whose cycle ends without a commit is forgotten by the next one.
    verify: have `verify` compare a checksum of every expert that another rank sent with the sender's own.
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
        self._rank = rank
        self._verify = verify
        self._load_expert: LoadExpert | None = None
        self._last_write: object | None = None
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
        self._prepared: tuple[_Arrivals, PreparedExchange] | None = None
        self._staged: tuple[_Arrivals, object] | None = None
        self.note_weights()

    def note_weights(self) -> None:
        """What the forward stream did to the weights until now, their loading included, precedes any fetch.

        Forward thread and stream, while no `fetch` runs. Raises RuntimeError while a graph is captured.
        """
        self._swapped = self._backend.streams.record()

    def fetch(self, chunk: Chunk) -> None:
        """Receive this rank's new experts of `chunk` into staging, and send what other ranks need.

        Background thread; forward thread at start and in a `resize`, where all ranks wait for each other.
        Every rank calls it with the same chunk, after its own `swap` of the one before. Slots keep their old
        weights. Raises GroupError, and MigrationError when the staging is too small for the chunk.
        """
        arrivals, messages = self._begin(chunk)
        streams = self._backend.streams
        with streams.transfer():
            streams.wait(self._swapped)
            for target, source in chain(arrivals.copies, self._loaded(chunk)):
                streams.copy(target, source)
            if chunk.crosses_ranks:
                self._backend.exchange(*messages)
            mark = streams.record()
        self._stage(arrivals, mark)

    def prepare(self, chunk: Chunk) -> None:
        """Make ready for `enqueue` all that needs no stream, so that the forward thread has little to do.

        Background thread. Raises MigrationError as `fetch` does, and while the device is still at an exchange
        that was given up: it may write into the staging.
        """
        arrivals, messages = self._begin(chunk)
        streams = self._backend.streams
        if self._last_write is not None and not streams.passed(self._last_write):
            raise MigrationError(
                f"rank {self._rank}: layers {list(chunk.layers)}: the device is still at an earlier "
                "exchange, and may write into the staging"
            )
        if (chunk.source < 0).any():
            raise MigrationError(f"layers {list(chunk.layers)}: no rank has some experts: fetch loads them")
        with streams.transfer():
            self._prepared = arrivals, self._backend.prepare_exchange(*messages)

    def enqueue(self, chunk: Chunk) -> None:
        """Enqueue what `fetch` would do with a prepared chunk, and wait for nothing.

        Forward thread, between two passes, at the same boundary on every rank. Raises RuntimeError, with
        nothing enqueued, while a graph is captured, and MigrationError when another chunk is prepared.
        """
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared[0].chunk is not chunk:
            raise MigrationError(f"rank {self._rank}: layers {list(chunk.layers)} are not prepared")
        arrivals, exchange = prepared
        streams = self._backend.streams
        streams.check_not_capturing()
        with streams.transfer():
            streams.wait(self._swapped)
            try:
                for target, source in arrivals.copies:
                    streams.copy(target, source)
                exchange.enqueue()
            finally:
                self._last_write = streams.record()
        self._stage(arrivals, self._last_write)

    def await_staged(self, timeout_s: float) -> None:
        """Return once the device has done all that was enqueued: what is staged then cannot be late.

        Background thread, which looks at the mark again and again: nothing else ends when a device stops. Not
        needed for the order of staging and `swap`. Raises MigrationError after `timeout_s` seconds.
        """
        if self._staged is None:
            return
        arrivals, mark = self._staged
        deadline = time.monotonic() + timeout_s
        while not self._backend.streams.passed(mark):
            if time.monotonic() > deadline:
                raise MigrationError(
                    f"rank {self._rank}: layers {list(arrivals.chunk.layers)}: the device has not finished "
                    f"copying into the staging after {timeout_s:g} s"
                )
            time.sleep(_LOOK_AGAIN_S)

    def verify(self, chunk: Chunk) -> None:
        """Compare what every rank received with what was sent, if the migrator is to; before the `swap`.

        Background thread, all ranks together. Raises ChecksumError, on every rank, which then has nothing
        staged; and GroupError.
        """
        if not (self._verify and chunk.crosses_ranks):
            return
        arrivals, departures = chunk.receives_of(self._rank), chunk.sends_of(self._rank)
        differences = np.zeros(chunk.num_moves, np.int64)
        with self._backend.streams.transfer():
            for row in np.flatnonzero((arrivals.peer != self._rank) & (arrivals.peer >= 0)).tolist():
                differences[arrivals.move[row]] -= self._backend.checksum(self._row(row))
            places = zip(departures.move.tolist(), departures.layer, departures.slot, strict=True)
            for move, layer, slot in places:
                differences[move] += self._backend.checksum(self._expert(layer, slot))
        differing = np.flatnonzero(self._backend.sum_on_host(differences))
        if len(differing):
            self._staged = None
            raise _checksum_error(chunk, differing)

    def swap(self, chunk: Chunk) -> None:
        """Overwrite the slots that `chunk` changes with what was staged for them.

        Forward thread, on the forward stream, between two passes. Raises MigrationError when another chunk,
        or none, is staged, and RuntimeError, with nothing enqueued, while a graph is captured.
        """
        staged = self._staged
        if staged is None or staged[0].chunk is not chunk:
            there = "nothing is" if staged is None else f"layers {list(staged[0].chunk.layers)} are"
            raise MigrationError(
                f"rank {self._rank}: swap of layers {list(chunk.layers)}, but {there} staged"
            )
        streams = self._backend.streams
        streams.check_not_capturing()
        self._staged = self._last_write = None  # from here on, marks keep the next exchange behind the swap
        arrivals, mark = staged
        streams.wait(mark)
        for layer, slots, rows in arrivals.layers:
            for parameter, buffers in zip(self._weights[layer], self.staging.buffers, strict=True):
                self._backend.swap_in(parameter, slots, buffers, rows)
        self._swapped = streams.record()
        self.experts_received += arrivals.received
        self.experts_copied += arrivals.copied

    # --- what there is to move ---

    def _begin(self, chunk: Chunk) -> tuple[_Arrivals, tuple[list[Message], list[Message]]]:
        """What comes, and (sends, receives): both ends of a pair walk the moves in the chunk's order."""
        self._staged = self._prepared = None
        moves, departures = chunk.receives_of(self._rank), chunk.sends_of(self._rank)
        if len(moves) > self.staging.slots:
            raise MigrationError(
                f"rank {self._rank}: {len(moves)} experts arrive in one chunk of layers "
                f"{list(chunk.layers)}, but the staging holds {self.staging.slots}: build the schedule with "
                "that staging_slots"
            )
        local = np.flatnonzero(moves.peer == self._rank)
        remote = np.flatnonzero((moves.peer != self._rank) & (moves.peer >= 0))
        sources = zip(
            local.tolist(), moves.layer[local].tolist(), moves.peer_slot[local].tolist(), strict=True
        )
        copies = [
            copy
            for row, layer, slot in sources
            for copy in zip(self._row(row), self._expert(layer, slot), strict=True)
        ]
        places = zip(departures.layer.tolist(), departures.slot.tolist(), strict=True)
        sends = _messages(departures.peer, [self._expert(layer, slot) for layer, slot in places])
        receives = _messages(moves.peer[remote], [self._row(row) for row in remote.tolist()])
        arrivals = _Arrivals(chunk, copies, _by_layer(moves), len(remote), len(moves) - len(remote))
        return arrivals, (sends, receives)

    def _loaded(self, chunk: Chunk) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(staging, weight) of what no rank has, taken from the checkpoint one expert after the other."""
        arrivals = chunk.receives_of(self._rank)
        rows = np.flatnonzero(arrivals.peer < 0)
        experts = zip(
            rows.tolist(), arrivals.layer[rows].tolist(), arrivals.expert[rows].tolist(), strict=True
        )
        for row, layer, expert in experts:
            if self._load_expert is None:
                raise MigrationError(f"layer {layer}: no rank has expert {expert}, and nothing loads it")
            loaded = list(self._load_expert(layer, expert))
            _check_loaded(loaded, self._row(row), f"layer {layer}, expert {expert}")
            yield from zip(self._row(row), loaded, strict=True)

    def _stage(self, arrivals: _Arrivals, mark: object) -> None:
        self.bytes_received += arrivals.received * self.staging.expert_bytes
        self._staged = arrivals, mark

    def _expert(self, layer: int, slot: int) -> list[torch.Tensor]:
        return [parameter[slot] for parameter in self._weights[layer]]

    def _row(self, row: int) -> list[torch.Tensor]:
        return [buffers[row] for buffers in self.staging.buffers]


def _check_loaded(loaded: Tensors, staged: Tensors, where: str) -> None:
    found = [(tensor.dtype, tuple(tensor.shape)) for tensor in loaded]
    expected = [(tensor.dtype, tuple(tensor.shape)) for tensor in staged]
    if found != expected:
        raise MigrationError(f"{where}: what was loaded is {found}, expected {expected} as in expert_weights")


def _checksum_error(chunk: Chunk, moves: NDArray[np.int64]) -> ChecksumError:
    first, slots = moves[0], chunk.map_after.slots_per_rank
    sender, receiver = chunk.source[first] // slots, chunk.target[first] // slots
    return ChecksumError(
        f"layer {chunk.layer[first]}, logical expert {chunk.expert[first]}: rank {receiver} received other "
        f"weights than rank {sender} read ({len(moves)} of {chunk.num_moves} moves differ)"
    )


def _messages(peers: NDArray[np.int32], experts: Sequence[Tensors]) -> list[Message]:
    pairs = zip(peers.tolist(), experts, strict=True)
    return [Message(peer, tensor) for peer, expert in pairs for tensor in expert]


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
