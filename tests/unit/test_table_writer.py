"""Tables are written through host memory that is used again once its copies are done, without a wait."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eplb_platform.integrations.vllm.table_writer import TableWriter
from eplb_platform.testing.simulated_accelerator import FORWARD, SimulatedDevice, SimulatedStreams
from tests.simulated_backend import SimulatedBackend


class Counting(SimulatedBackend):
    """Counts what is allocated on the host."""

    allocated = 0

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.allocated += 1
        return super().allocate_on_host(shape, dtype)


class Held(SimulatedStreams):
    """A device that has stopped: no mark passes."""

    def passed(self, mark: object) -> bool:
        return False


def rows_of(commit: int) -> NDArray[np.int32]:
    return np.arange(12, dtype=np.int32).reshape(2, 2, 3) + 100 * commit


@pytest.mark.parametrize("seed", range(200))
def test_every_row_arrives_whatever_the_stream_does(seed: int) -> None:
    device = SimulatedDevice(seed)
    writer = TableWriter(SimulatedBackend(SimulatedStreams(device)), torch.int64, entries=24)
    table = torch.zeros(4, 2, 3, dtype=torch.int64)
    expected = torch.zeros_like(table)
    seen: list[tuple[int, bool]] = []
    for commit in range(12):
        layers = [commit % 4, (commit + 1) % 4]
        rows = rows_of(commit)
        writer.write(table, layers, rows)
        expected[layers] = torch.from_numpy(rows).long()
        right = expected.clone()
        device.enqueue(FORWARD, lambda c=commit, r=right: seen.append((c, torch.equal(table, r))))  # type: ignore[misc]
        rows[:] = -7
    device.finish()
    assert seen == [(commit, True) for commit in range(12)]


def test_it_does_not_wait_for_a_device_that_has_stopped(caplog: pytest.LogCaptureFixture) -> None:
    backend = Counting(Held(SimulatedDevice(0, eagerness=0.0)))
    writer = TableWriter(backend, torch.int64, entries=24)
    table = torch.zeros(2, 2, 3, dtype=torch.int64)
    with caplog.at_level(logging.WARNING):
        for commit in range(4):
            writer.write(table, [0, 1], rows_of(commit))
        assert backend.allocated == 2 and not caplog.records
        writer.write(table, [0, 1], rows_of(4))
    assert backend.allocated == 3
    assert [record.message for record in caplog.records] == [
        "the device is behind by 2 writes of all routing tables"
    ]


@pytest.mark.parametrize("seed", range(50))
def test_commits_in_the_order_of_the_balancer_allocate_nothing_more(seed: int) -> None:
    """Before a commit, the device has passed the swap of the one before; that one's tables may be pending."""
    device = SimulatedDevice(seed)
    streams = SimulatedStreams(device)
    backend = Counting(streams)
    writer = TableWriter(backend, torch.int64, entries=12)
    table = torch.zeros(2, 2, 3, dtype=torch.int64)
    swapped = streams.record()
    for commit in range(20):
        while not streams.passed(swapped):
            pass
        swapped = streams.record()
        writer.write(table, [0, 1], rows_of(commit))
    assert backend.allocated == 2
    device.finish()
    assert torch.equal(table, torch.from_numpy(rows_of(19)).long())


def test_rows_that_are_larger_than_expected_get_a_room() -> None:
    device = SimulatedDevice(0)
    writer = TableWriter(SimulatedBackend(SimulatedStreams(device)), torch.int64, entries=5)
    table = torch.zeros(2, 2, 3, dtype=torch.int64)
    writer.write(table, [0, 1], rows_of(0))
    device.finish()
    assert torch.equal(table, torch.from_numpy(rows_of(0)).long())


def test_nothing_is_written_into_a_graph_that_is_captured() -> None:
    streams = SimulatedStreams(SimulatedDevice(0, eagerness=0.0))
    writer = TableWriter(SimulatedBackend(streams), torch.int64, entries=12)
    streams.is_capturing = True
    with pytest.raises(RuntimeError, match="captured"):
        writer.write(torch.zeros(2, 2, 3, dtype=torch.int64), [0, 1], rows_of(0))
    assert not streams.device.pending(FORWARD)
