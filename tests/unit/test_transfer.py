"""On a device, copies only run later: whatever the streams do first, marks keep fetch and swap in order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from eplb_backends.cpu import CpuBackend
from eplb_backends.cpu.streams import SerialStreams
from eplb_platform.backend import Message, StreamOperations
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import build_schedule
from eplb_platform.migration.staging import Staging
from eplb_platform.migration.transfer import MigrationError, Migrator
from eplb_platform.topology import Topology

Mark = tuple[str, int]


class QueuedStreams(StreamOperations):
    """A forward and a transfer stream whose work is only queued until `drain` runs it."""

    def __init__(self) -> None:
        self.current = "forward"
        self.queues: dict[str, list[Mark | Callable[[], None]]] = {"forward": [], "transfer": []}

    @contextmanager
    def transfer(self) -> Iterator[None]:
        self.current = "transfer"
        yield
        self.current = "forward"

    def enqueue(self, work: Callable[[], None]) -> None:
        self.queues[self.current].append(work)

    def record(self) -> Mark:
        return self.current, len(self.queues[self.current])

    def wait(self, mark: object) -> None:
        assert isinstance(mark, tuple)
        self.queues[self.current].append(mark)

    def passed(self, mark: object) -> bool:
        return False

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.enqueue(lambda: CpuBackend().streams.copy(target, source))

    def drain(self, choose: Callable[[list[str]], str]) -> None:
        """Run everything; when both streams could go on, `choose` says which one does."""
        done = {"forward": 0, "transfer": 0}

        def ready(stream: str) -> bool:
            if done[stream] == len(self.queues[stream]):
                return False
            work = self.queues[stream][done[stream]]
            return callable(work) or done[work[0]] >= work[1]

        while streams := [stream for stream in done if ready(stream)]:
            stream = choose(streams)
            work = self.queues[stream][done[stream]]
            if callable(work):
                work()
            done[stream] += 1
        assert all(done[stream] == len(queue) for stream, queue in self.queues.items())


class LoneBackend(CpuBackend):
    """One rank without a group: everything is a copy within it."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        assert not sends
        assert not receives


class QueuedBackend(LoneBackend):
    """A device whose swaps, too, are only queued."""

    def __init__(self, streams: QueuedStreams) -> None:
        super().__init__(streams)
        self.queued = streams

    def swap_in(
        self,
        parameter: Sequence[torch.Tensor] | torch.Tensor,
        slots: Sequence[int],
        staging: Sequence[torch.Tensor],
        rows: Sequence[int],
    ) -> None:
        swap = super().swap_in
        self.queued.enqueue(lambda: swap(parameter, slots, staging, rows))


@pytest.mark.parametrize("seed", range(30))
def test_any_order_that_the_marks_allow_is_right(seed: int) -> None:
    maps = [[[0, 1, 2]] * 4, [[1, 2, 0]] * 4, [[0, 2, 1]] * 4]
    old, middle, new = (ExpertMap(rows, 3, Topology(1)) for rows in maps)
    streams = QueuedStreams()
    backend = QueuedBackend(streams)
    weights = [[torch.zeros(3, 5)] for _ in range(4)]
    loaded = torch.arange(3.0)[:, None].expand(3, 5)
    for (
        parameter,
    ) in weights:  # the checkpoint is loaded on the forward stream, and may still be on its way
        streams.copy(parameter, loaded)
    staging = Staging(backend, weights, max_bytes=None, layers_per_chunk=2)
    migrator = Migrator(backend, weights, staging, rank=0)
    for before, after in ((old, middle), (middle, new)):
        schedule = build_schedule(before, after, layers_per_chunk=2, staging_slots=staging.slots)
        assert len(schedule.chunks) == 2
        for chunk in schedule.chunks:
            migrator.fetch(chunk)
            migrator.swap(chunk)
    random_choice = random.Random(seed).choice
    streams.drain({0: min, 1: max}.get(seed, random_choice))  # forward as soon as it can be, or as late
    for layer, (parameter,) in enumerate(weights):
        expected = torch.from_numpy(new.physical_to_logical[layer].copy()).float()[:, None].expand(3, 5)
        assert torch.equal(parameter, expected)
    assert (migrator.experts_copied, migrator.experts_received, migrator.bytes_received) == (4 * 5, 0, 0)


@pytest.mark.parametrize("are_others", [False, True])
def test_weights_that_are_loaded_anew_are_not_fetched_before(are_others: bool) -> None:
    """The transfer stream goes on as soon as it can: the loading is late on the forward stream."""
    before, after = (ExpertMap([row], 3, Topology(1)) for row in ([0, 1, 2], [1, 2, 0]))
    streams = QueuedStreams()
    backend = QueuedBackend(streams)
    weights = [[torch.zeros(3, 5)]]
    staging = Staging(backend, weights, max_bytes=None, layers_per_chunk=1)
    migrator = Migrator(backend, weights, staging, rank=0)
    if are_others:
        weights = [[torch.zeros(3, 5)]]
    streams.copy(weights[0][0], torch.arange(3.0)[:, None].expand(3, 5))
    if are_others:
        migrator.follow(weights)
    else:
        migrator.note_weights()
    [chunk] = build_schedule(before, after, layers_per_chunk=1, staging_slots=staging.slots).chunks
    migrator.fetch(chunk)
    migrator.swap(chunk)
    streams.drain(max)
    assert weights[0][0][:, 0].tolist() == [1.0, 2.0, 0.0]


class StuckStreams(SerialStreams):
    """A device that has stopped."""

    def passed(self, mark: object) -> bool:
        return False


def test_a_device_that_has_stopped_is_not_waited_for_without_end() -> None:
    backend = LoneBackend(StuckStreams())
    weights = [[torch.arange(2.0)]]
    migrator = Migrator(
        backend, weights, Staging(backend, weights, max_bytes=None, layers_per_chunk=1), rank=0
    )
    migrator.await_staged(0.0)  # nothing is staged
    old, new = (ExpertMap([row], 2, Topology(1)) for row in ([0, 1], [1, 0]))
    (chunk,) = build_schedule(old, new, layers_per_chunk=1, staging_slots=2).chunks
    migrator.fetch(chunk)
    with pytest.raises(MigrationError, match=r"rank 0: layers \[0\]: the device has not finished copying"):
        migrator.await_staged(0.01)
    assert weights[0][0].tolist() == [0.0, 1.0]


class PlainStreams(SerialStreams):
    """Copies as a backend may do on its own thread, where autograd is on."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)


def test_weights_that_require_gradients_move_too() -> None:
    backend = LoneBackend(PlainStreams())
    weights = [[torch.nn.Parameter(torch.arange(2.0))], [torch.nn.Parameter(torch.arange(2.0))]]
    staging = Staging(backend, weights, max_bytes=None, layers_per_chunk=1)
    migrator = Migrator(backend, weights, staging, rank=0)
    old, new = (ExpertMap([row, row], 2, Topology(1)) for row in ([0, 1], [1, 0]))
    for chunk in build_schedule(old, new, layers_per_chunk=1, staging_slots=2).chunks:
        migrator.fetch(chunk)
        migrator.swap(chunk)
    assert [parameter.tolist() for (parameter,) in weights] == [[1.0, 0.0]] * 2
    assert not any(row.requires_grad for rows in staging.buffers for row in rows)
