"""The way by the device's collective library where something is wrong: what is ended, kept and refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch

from eplb_backends.accelerator import collective_transfer
from eplb_backends.accelerator.collective_transfer import CollectiveTransfer
from eplb_backends.accelerator.weights import DenseLayout
from eplb_backends.cpu.streams import SerialStreams
from eplb_platform.backend import GroupError, Message, StreamOperations


class Group:
    """Notes what is asked of it."""

    def __init__(self, fails: bool = False) -> None:
        self.batches: list[tuple[int, int]] = []
        self.is_aborted = False
        self._fails = fails

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.batches.append((len(sends), len(receives)))
        if self._fails:
            raise RuntimeError("no\nconnection")

    def abort(self) -> None:
        self.is_aborted = True


class NotedStreams(SerialStreams):
    """`is_stuck` is set by a test: the device goes on no more."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.is_stuck = False

    def keep(self, tensor: torch.Tensor) -> None:
        self.kept.append(tensor)

    def record(self) -> object:
        return object()

    def passed(self, mark: object) -> bool:
        return not self.is_stuck


@pytest.fixture
def streams() -> NotedStreams:
    return NotedStreams()


@pytest.fixture
def way(streams: StreamOperations) -> CollectiveTransfer:
    return CollectiveTransfer(streams, DenseLayout(), device_type="cpu", rank=1)


def test_the_group_before_is_ended_when_a_new_one_is_opened(way: CollectiveTransfer) -> None:
    first, second = Group(), Group()
    way.open(first, [0, 1, 2], 1.0)
    way.open(second, [1, 2], 1.0)
    assert (first.batches, first.is_aborted) == ([(2, 2)], True)
    assert (second.batches, second.is_aborted) == ([(1, 1)], False)


def test_ranks_that_do_not_connect_in_time_end_the_group(
    way: CollectiveTransfer, streams: NotedStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collective_transfer, "_QUIET_S", 0.01)
    group = Group()
    streams.is_stuck = True
    with pytest.raises(
        GroupError, match=r"rank 1: connecting the ranks: the device was not done within 0\.05"
    ):
        way.open(group, [0, 1], 0.05)
    assert group.is_aborted


def test_the_end_of_an_aborted_group_waits_for_the_device_so_it_is_kept(way: CollectiveTransfer) -> None:
    group = Group()
    way.open(group, [0, 1], 1.0)
    way.stop()
    still_there = weakref.ref(group)
    del group
    gc.collect()
    assert still_there() is not None


def test_memory_of_an_exchange_is_kept_for_the_stream(way: CollectiveTransfer, streams: NotedStreams) -> None:
    """That of scattered tensors, and the contiguous memory that they go through."""
    way.open(Group(), [0, 1], 1.0)
    whole, scattered = torch.zeros(3), torch.zeros(4, 2).t()
    way.prepare([Message(0, whole), Message(0, scattered)], [Message(0, scattered)])
    kept = [tensor.data_ptr() for tensor in streams.kept]
    assert kept[:2] == [whole.data_ptr(), scattered.data_ptr()]
    assert kept[3] == scattered.data_ptr()
    assert len(set(kept)) == 4


def test_only_other_ranks_of_the_group_are_peers(way: CollectiveTransfer) -> None:
    way.open(Group(), [0, 1], 1.0)
    for peer in (1, 2):
        with pytest.raises(ValueError, match=rf"rank 1: a message has peer {peer}; expected .*\[0\]"):
            way.prepare([Message(peer, torch.zeros(3))], [])
    with pytest.raises(ValueError, match="the tensor for rank 0 is on meta, expected cpu"):
        way.prepare([], [Message(0, torch.zeros(3, device="meta"))])


def test_what_was_prepared_for_a_group_that_has_ended_is_not_enqueued(way: CollectiveTransfer) -> None:
    group = Group()
    way.open(group, [0, 1], 1.0)
    prepared = way.prepare([Message(0, torch.zeros(3))], [])
    way.stop()
    with pytest.raises(GroupError, match="rank 1: exchange: the group was closed on this rank"):
        prepared.enqueue()
    assert group.batches == [(1, 1)]


def test_an_error_of_the_library_is_one_line(way: CollectiveTransfer) -> None:
    with pytest.raises(GroupError, match=r"^rank 1: exchange: no connection$"):
        way.open(Group(fails=True), [0, 1], 1.0)
