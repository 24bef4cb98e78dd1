"""Experts move on a simulated accelerator, in thousands of interleavings; without any one wait some go wrong.

One rank is the real code: migrator, staging, swap, both transfers, checksums, deferred reads. Its peers are a
script that knows every expert's bytes; gloo is a function call, and the device's collective library enqueues
what the script says, so that a seed takes milliseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import FrameType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eplb_backends.accelerator import streams as accelerator_streams
from eplb_backends.accelerator.collective_transfer import CollectiveTransfer
from eplb_backends.accelerator.host_transfer import HostTransfer
from eplb_backends.accelerator.weights import DenseLayout
from eplb_backends.cpu.weights import checksum as checksum_on_host
from eplb_platform.backend import GroupError, Message, PreparedExchange
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Chunk, RankMoves, build_schedule
from eplb_platform.migration.staging import Staging
from eplb_platform.migration.transfer import ChecksumError, MigrationError, Migrator
from eplb_platform.runtime.deferred_reads import DeferredReader
from eplb_platform.testing.simulated_accelerator import (
    FORWARD,
    TRANSFER,
    SimulatedDevice,
    SimulatedStreams,
    SimulationError,
)
from eplb_platform.topology import Topology
from tests.simulated_backend import SimulatedBackend

NUM_RANKS, SLOTS, LAYERS, EXPERTS = 3, 3, 2, 6
PAIR_BYTES = 80
"""Of one round; an expert has 48 + 5 + 32 bytes."""
SEEDS = 1500
MUTANT_SEEDS = 400

WAITS = {
    "Migrator.fetch": "the last swap has read its staging and written its slots, before these are used",
    "Migrator.swap": "the experts are in staging, before they are copied into their slots",
    "Migrator.await_staged": "the experts are in staging, before other ranks are told so",
    "HostTransfer._await": "a round is in pinned memory, and the one before has left it, before gloo goes on",
    "HostTransfer._quiet": "nothing of a failed exchange is left, before its tensors may be freed",
    "HostTransfer.stop": "nothing is written into staging after an abort",
    "_on_host": "a piece is in host memory, before it is summed up",
    "DeferredReader.ready": "a load is in host memory, before it is read",
}
"""Every place where the shared layer waits for the device, or asks it, and what for; transport "host"."""

FORWARD_WAITS = {
    "Migrator.enqueue": "as Migrator.fetch",
    "Migrator.swap": WAITS["Migrator.swap"],
    "Migrator.await_staged": WAITS["Migrator.await_staged"],
    "CollectiveTransfer.stop": WAITS["HostTransfer.stop"],
    "CollectiveTransfer.wait": "every pair is connected, before the model goes on",
    "_on_host": WAITS["_on_host"],
    "DeferredReader.ready": WAITS["DeferredReader.ready"],
}
"""The same where the forward thread enqueues exchanges."""

CANNOT_SHOW = {"Migrator.prepare"}
"""Whether an exchange that was given up is over: on one stream the next one comes after it anyway."""

_INSIDE = {"wait_on_host"}
"""Functions that wait for others: the place is their caller's."""


class WatchedStreams(SimulatedStreams):
    """Notes who waits, and lets one of them not wait."""

    def __init__(self, device: SimulatedDevice, ignored: str | None) -> None:
        super().__init__(device)
        self.seen: set[str] = set()
        self._ignored = ignored

    def wait(self, mark: object) -> None:
        if not self._is_ignored(sys._getframe(1)):
            super().wait(mark)

    def passed(self, mark: object) -> bool:
        return self._is_ignored(sys._getframe(1)) or super().passed(mark)

    def _is_ignored(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code.co_qualname in _INSIDE:
            frame = frame.f_back
        assert frame is not None
        self.seen.add(frame.f_code.co_qualname)
        return frame.f_code.co_qualname == self._ignored


class ScriptedPeers:
    """The group as one rank sees it: what its peers send is known beforehand, what it sends is kept."""

    def __init__(self, chunk: Chunk, rank: int, during: Callable[[int], None]) -> None:
        incoming = octets_by_peer(chunk.receives_of(rank), rank)
        self.is_closed = False
        self.hangs = False
        self.checksums = checksums_of_peers(chunk, rank)
        self.sent: dict[int, bytes] = {}
        self._incoming = incoming
        self._during = during
        self._rounds = 0

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], timeout_s: float) -> None:
        if self.is_closed:
            raise GroupError("closed")
        self._during(self._rounds)
        self._rounds += 1
        for message in sends:
            self.sent[message.peer] = self.sent.get(message.peer, b"") + message.tensor.numpy().tobytes()
        for message in receives:
            size = message.tensor.numel()
            octets, self._incoming[message.peer] = (
                self._incoming[message.peer][:size],
                self._incoming[message.peer][size:],
            )
            message.tensor.numpy()[:] = np.frombuffer(octets, np.uint8)


class ScriptedBackend(SimulatedBackend):
    """Rank `rank`, with a group that is a script."""

    def __init__(self, streams: SimulatedStreams, rank: int) -> None:
        super().__init__(streams)
        self.peers: ScriptedPeers | None = None
        self.way = HostTransfer(
            streams,
            DenseLayout(),
            device_type="cpu",
            rank=rank,
            num_ranks=NUM_RANKS,
            pinned_bytes=4 * (NUM_RANKS - 1) * PAIR_BYTES,
            allocate=lambda nbytes: self.allocate_on_host((nbytes,), torch.uint8),
        )

    def sum_on_host(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self.peers is not None
        return values + self.peers.checksums

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        assert self.peers is not None
        self.way.exchange(self.peers, sends, receives, 30.0)

    def abort(self) -> None:
        assert self.peers is not None
        self.peers.is_closed = True
        self.way.stop()


class ScriptedLibrary:
    """A `DeviceGroup`: batches run on the stream, and what peers send is known beforehand."""

    def __init__(self, streams: SimulatedStreams) -> None:
        self.peers: ScriptedPeers | None = None
        self.batches = 0
        self.connected = 0
        self._streams = streams
        self._is_aborted = False

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        peers = self.peers
        if peers is None:
            self._streams.launch(self._connect)
            return
        self.batches += 1
        self._streams.launch(lambda: peers.exchange(sends, [], 0.0))
        self._streams.await_arrival(lambda: not peers.hangs or self._is_aborted)
        self._streams.launch(lambda: self._receive(peers, receives))

    def abort(self) -> None:
        self._is_aborted = True

    def _connect(self) -> None:
        self.connected += 1

    def _receive(self, peers: ScriptedPeers, receives: Sequence[Message]) -> None:
        if self._is_aborted:
            for message in receives:
                message.tensor.fill_(0xA5)
        else:
            peers.exchange([], receives, 0.0)


class ScriptedForwardBackend(ScriptedBackend):
    """The same, where the forward thread enqueues exchanges."""

    enqueues_on_forward = True

    def __init__(self, streams: SimulatedStreams, rank: int) -> None:
        super().__init__(streams, rank)
        self.by_forward = CollectiveTransfer(streams, DenseLayout(), device_type="cpu", rank=rank)
        self.open()

    def open(self) -> None:
        self.library = ScriptedLibrary(self.simulated)
        self.by_forward.open(self.library, range(NUM_RANKS), 30.0)

    @property
    def simulated(self) -> SimulatedStreams:
        assert isinstance(self.streams, SimulatedStreams)
        return self.streams

    def prepare_exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> PreparedExchange:
        self.library.peers = self.peers
        return self.by_forward.prepare(sends, receives)

    def abort(self) -> None:
        self.by_forward.stop()


def expert(layer: int, logical: int) -> list[torch.Tensor]:
    """The weights of one expert; the last lies transposed in memory."""
    value = 1 + layer * EXPERTS + logical
    return [
        torch.full((4, 3), float(value)),
        torch.full((5,), value, dtype=torch.int8),
        (torch.arange(8.0).reshape(2, 4) + 100 * value).t(),
    ]


PATTERN = [[expert(layer, logical) for logical in range(EXPERTS)] for layer in range(LAYERS)]


def octets_by_peer(moves: RankMoves, rank: int) -> dict[int, bytes]:
    """What each pair has to say: the experts in order."""
    octets: dict[int, bytes] = {}
    for layer, logical, peer in zip(moves.layer, moves.expert, moves.peer.tolist(), strict=True):
        if peer != rank:
            octets[peer] = octets.get(peer, b"") + octets_of(PATTERN[layer][logical])
    return octets


def checksums_of_peers(chunk: Chunk, rank: int) -> NDArray[np.int64]:
    """[moves], what all other ranks together add to the comparison of what was sent and received."""
    checksums = np.zeros(chunk.num_moves, np.int64)
    for sign, moves in ((1, chunk.receives_of(rank)), (-1, chunk.sends_of(rank))):
        for move, layer, logical, peer in zip(moves.move, moves.layer, moves.expert, moves.peer, strict=True):
            if peer != rank:
                checksums[move] += sign * checksum_on_host(PATTERN[layer][logical])
    return checksums


def placed(rows: Sequence[Sequence[int]]) -> list[list[torch.Tensor | list[torch.Tensor]]]:
    """[layer][parameter] of one rank, whose slots hold the experts in `rows` [layer][slot]."""
    weights: list[list[torch.Tensor | list[torch.Tensor]]] = []
    for layer, row in enumerate(rows):
        first, second, third = zip(*(PATTERN[layer][logical] for logical in row), strict=True)
        stacked = torch.stack([tensor.t() for tensor in third]).transpose(1, 2)
        weights.append([torch.stack(first), [tensor.clone() for tensor in second], stacked])
    return weights


def octets_of(tensors: Sequence[torch.Tensor]) -> bytes:
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


MAPS = [
    ExpertMap(rows, EXPERTS, Topology(NUM_RANKS))
    for rows in (
        [[0, 1, 2, 3, 4, 5, 0, 2, 4], [0, 1, 2, 3, 4, 5, 0, 2, 4]],
        [[5, 3, 0, 1, 2, 4, 5, 0, 3], [2, 0, 4, 1, 3, 5, 4, 1, 2]],
        [[1, 4, 5, 0, 3, 2, 1, 5, 4], [5, 1, 0, 2, 0, 4, 3, 5, 1]],
    )
]
CHUNKS = [
    chunk
    for old, new in pairwise(MAPS)
    for chunk in build_schedule(old, new, layers_per_chunk=1, staging_slots=SLOTS).chunks
]


MAPS_IN_FORCE = [MAPS[0], *(chunk.map_after for chunk in CHUNKS)]


@cache
def rank_weights(which: int, rank: int) -> list[list[torch.Tensor | list[torch.Tensor]]]:
    """What a rank holds under one of `MAPS_IN_FORCE`; not to be changed."""
    return placed(MAPS_IN_FORCE[which].by_rank()[:, rank].tolist())


@pytest.fixture(autouse=True)
def look_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator_streams, "_POLL_S", 0.0)


class Episode:
    """One rank over all chunks, with passes in between and beside; `faults` says what went wrong."""

    backend_kind: type[ScriptedBackend] = ScriptedBackend

    def __init__(self, seed: int, ignored: str | None = None) -> None:
        self.rank = seed % NUM_RANKS
        self.verifies = seed % 2 == 1
        self.awaits = seed % 4 >= 2  # as the cycle does, which hides a swap that does not wait
        self.faults: list[str] = []
        self.device = SimulatedDevice(seed)
        self.streams = WatchedStreams(self.device, ignored)
        self.backend = self.backend_kind(self.streams, self.rank)
        self.map = MAPS[0]
        self.weights = placed(self.map.by_rank()[:, self.rank].tolist())
        staging = Staging(self.backend, self.weights, max_bytes=None, layers_per_chunk=1)
        self.migrator = Migrator(self.backend, self.weights, staging, self.rank, verify=self.verifies)
        self.load = torch.zeros(4, dtype=torch.int64)
        self.reader: DeferredReader[int] = DeferredReader(self.backend, (4,), torch.int64, depth=3)
        self.reads = 0
        self.passes = 0

    def run(self) -> list[str]:
        try:
            for number, chunk in enumerate(CHUNKS):
                if number == 1:
                    self._fail(chunk)
                self._pass()
                self._fetch(chunk)
                self._pass()
                self.migrator.swap(chunk)
                self.map = chunk.map_after
                self._pass()
            self.device.finish()
            self._check_reads()
        except (ChecksumError, SimulationError) as error:
            self.faults.append(str(error))
        return self.faults

    # --- the forward stream ---

    def _pass(self) -> None:
        """The model reads its weights, counts its load and goes on counting from zero."""
        self.passes += 1
        number = self.passes
        self._enqueue_model()
        self.device.enqueue(FORWARD, lambda: self.load.fill_(number))
        self.reader.put(self.load, number)
        self.device.enqueue(FORWARD, lambda: self.load.zero_())
        self._check_reads()

    def _enqueue_model(self) -> None:
        place = f"the model after {self.passes} passes"
        expected = rank_weights(MAPS_IN_FORCE.index(self.map), self.rank)

        def model() -> None:
            for actual, right in zip(self.weights, expected, strict=True):
                (first, second, third), (right_1, right_2, right_3) = actual, right
                if not (
                    torch.equal(first, right_1)  # type: ignore[arg-type]
                    and all(map(torch.equal, second, right_2))
                    and torch.equal(third, right_3)  # type: ignore[arg-type]
                ):
                    self.faults.append(f"{place} saw wrong weights")

        self.device.enqueue(FORWARD, model)

    def _check_reads(self) -> None:
        for tag, load in self.reader.ready():
            self.reads += 1
            if load.tolist() != [tag] * 4:
                self.faults.append(f"the load of pass {tag} was read as {load.tolist()}")

    # --- the background thread ---

    def _fetch(self, chunk: Chunk) -> None:
        peers = self.backend.peers = ScriptedPeers(
            chunk, self.rank, lambda round_: self._enqueue_model() if round_ == 1 else None
        )
        self.migrator.fetch(chunk)
        if self.awaits:
            self.migrator.await_staged(30.0)
            if self.device.pending(TRANSFER):
                self.faults.append("experts were called staged that are still on their way")
        self.migrator.verify(chunk)
        outgoing = octets_by_peer(chunk.sends_of(self.rank), self.rank)
        if peers.sent != outgoing:
            self.faults.append(f"peers were sent wrong bytes of layers {chunk.layers}")

    def _fail(self, chunk: Chunk) -> None:
        """The group ends in the second round, as when another rank gives up."""
        kept: list[torch.Tensor] = []

        def end(round_: int) -> None:
            if round_ == 1:
                self.backend.abort()
                kept.extend(row.clone() for rows in self.migrator.staging.buffers for row in rows)
                raise GroupError("the connection was closed")

        self.backend.peers = ScriptedPeers(chunk, self.rank, end)
        with pytest.raises(GroupError):
            self.migrator.fetch(chunk)
        if self.device.pending(TRANSFER):
            self.faults.append("copies of a failed exchange are still to come")
        self._check_nothing_is_written_after_the_abort(kept)

    def _check_nothing_is_written_after_the_abort(self, kept: Sequence[torch.Tensor]) -> None:
        now = [row for rows in self.migrator.staging.buffers for row in rows]
        while self.device.pending(TRANSFER):
            self.streams.device.look_at(self.streams.record())
        if not all(octets_of([a]) == octets_of([b]) for a, b in zip(kept, now, strict=True)):
            self.faults.append("staging was written after an abort")


class ForwardEpisode(Episode):
    """The forward thread enqueues exchanges, between two passes."""

    backend_kind = ScriptedForwardBackend

    def _fetch(self, chunk: Chunk) -> None:
        backend = self.backend
        assert isinstance(backend, ScriptedForwardBackend)
        if not backend.library.connected:
            self.faults.append("the model went on before the ranks were connected")
        peers = backend.peers = ScriptedPeers(chunk, self.rank, lambda _: None)
        self.migrator.prepare(chunk)
        self._pass()
        self.migrator.enqueue(chunk)
        self._pass()
        if self.awaits or self.verifies:
            self.migrator.await_staged(30.0)
            if self.device.pending(TRANSFER):
                self.faults.append("experts were called staged that are still on their way")
        self.migrator.verify(chunk)
        outgoing = octets_by_peer(chunk.sends_of(self.rank), self.rank)

        def check() -> None:
            if peers.sent != outgoing:
                self.faults.append(f"peers were sent wrong bytes of layers {chunk.layers}")

        with self.streams.transfer():
            self.streams.launch(check)

    def _fail(self, chunk: Chunk) -> None:
        """The peers never enqueue their part; the next group carries the next exchange."""
        backend = self.backend
        assert isinstance(backend, ScriptedForwardBackend)
        backend.peers = ScriptedPeers(chunk, self.rank, lambda _: None)
        backend.peers.hangs = True
        self.migrator.prepare(chunk)
        while self.device.pending(TRANSFER):  # no cycle goes on before its own exchange has ended
            self.device.look_at(self.streams.record())
        self.migrator.enqueue(chunk)
        backend.abort()
        kept = [row.clone() for rows in self.migrator.staging.buffers for row in rows]
        self._check_nothing_is_written_after_the_abort(kept)
        backend.open()


def seeds_that_fail(
    ignored: str | None, seeds: range, kind: type[Episode] = Episode
) -> Iterator[tuple[int, list[str]]]:
    return ((seed, faults) for seed in seeds if (faults := kind(seed, ignored).run()))


KINDS = [(Episode, WAITS), (ForwardEpisode, FORWARD_WAITS)]


@pytest.mark.parametrize(("kind", "seeds"), [(Episode, SEEDS), (ForwardEpisode, SEEDS // 2)])
def test_whatever_the_order_experts_arrive_and_no_pass_sees_others(kind: type[Episode], seeds: int) -> None:
    assert next(seeds_that_fail(None, range(seeds), kind), None) is None


@pytest.mark.parametrize(("kind", "waits"), KINDS)
def test_the_episode_has_all_that_can_go_wrong(kind: type[Episode], waits: dict[str, str]) -> None:
    episodes = [kind(seed) for seed in range(2 * NUM_RANKS)]
    assert not any(fault for episode in episodes for fault in episode.run())
    assert set().union(*(episode.streams.seen for episode in episodes)) - CANNOT_SHOW == set(waits)
    for episode in episodes:
        moves = [chunk.receives_of(episode.rank) for chunk in CHUNKS]
        assert any((move.peer == episode.rank).any() for move in moves)  # copies within the rank
        assert all((move.peer != episode.rank).any() for move in moves)
        assert episode.reads > 5
        assert episode.device.executed > 100


@pytest.mark.parametrize(("kind", "wait"), [(kind, wait) for kind, waits in KINDS for wait in waits])
def test_without_any_one_wait_some_order_is_wrong(kind: type[Episode], wait: str) -> None:
    assert next(seeds_that_fail(wait, range(MUTANT_SEEDS), kind), None) is not None


def test_no_exchange_is_prepared_while_the_device_is_at_one_that_was_given_up() -> None:
    episode = ForwardEpisode(0)
    backend = episode.backend
    assert isinstance(backend, ScriptedForwardBackend)
    backend.peers = ScriptedPeers(CHUNKS[0], episode.rank, lambda _: None)
    backend.peers.hangs = True
    episode.migrator.prepare(CHUNKS[0])
    episode.migrator.enqueue(CHUNKS[0])
    with pytest.raises(MigrationError, match="still at an earlier exchange"):
        episode.migrator.prepare(CHUNKS[1])


def test_nothing_is_enqueued_while_a_graph_is_captured() -> None:
    episode = ForwardEpisode(0)
    backend = episode.backend
    assert isinstance(backend, ScriptedForwardBackend)
    backend.peers = ScriptedPeers(CHUNKS[0], episode.rank, lambda _: None)
    episode.migrator.prepare(CHUNKS[0])
    episode.device.finish()
    episode.streams.is_capturing = True
    with pytest.raises(RuntimeError, match="captured"):
        episode.migrator.enqueue(CHUNKS[0])
    assert episode.device.pending(TRANSFER) == 0
    assert backend.library.batches == 0


def test_nothing_is_swapped_in_while_a_graph_is_captured_but_can_be_afterwards() -> None:
    episode = Episode(0)
    episode._fetch(CHUNKS[0])
    episode.device.finish()
    before = [octets_of([parameter[0] for parameter in layer]) for layer in episode.weights]
    episode.streams.is_capturing = True
    with pytest.raises(RuntimeError, match="captured"):
        episode.migrator.swap(CHUNKS[0])
    assert not episode.device.pending(FORWARD)
    assert before == [octets_of([parameter[0] for parameter in layer]) for layer in episode.weights]
    episode.streams.is_capturing = False
    episode.migrator.swap(CHUNKS[0])
    episode.map = CHUNKS[0].map_after
    episode._pass()
    episode.device.finish()
    assert not episode.faults


def test_experts_that_differ_from_what_was_sent_are_not_swapped_in() -> None:
    episode = Episode(1)
    assert episode.verifies
    chunk = CHUNKS[0]
    peers = episode.backend.peers = ScriptedPeers(chunk, episode.rank, lambda _: None)
    peers.checksums[chunk.receives_of(episode.rank).move[0]] += 1
    episode.migrator.fetch(chunk)
    with pytest.raises(ChecksumError):
        episode.migrator.verify(chunk)
    with pytest.raises(MigrationError, match="nothing is staged"):
        episode.migrator.swap(chunk)
