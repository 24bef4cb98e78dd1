"""Loads come from the device some passes later, in order, each with the tag it was put under."""

from __future__ import annotations

import pytest
import torch

from eplb_backends.cpu import CpuBackend
from eplb_platform.runtime.deferred_reads import DeferredReader
from eplb_platform.testing.simulated_accelerator import FORWARD, SimulatedDevice, SimulatedStreams
from tests.simulated_backend import SimulatedBackend


def test_host_memory_is_read_at_once() -> None:
    reader: DeferredReader[str] = DeferredReader(CpuBackend(), (2, 3), torch.int32)
    load = torch.ones(2, 3, dtype=torch.int32)
    assert reader.put(load, "first")
    load += 1
    [(tag, values)] = reader.ready()
    assert (tag, values.tolist(), values.dtype) == ("first", [[1, 1, 1]] * 2, "int32")
    assert reader.ready() == []


@pytest.mark.parametrize("seed", range(20))
def test_every_value_comes_once_and_in_order_however_late_the_device_is(seed: int) -> None:
    streams = SimulatedStreams(SimulatedDevice(seed))
    reader: DeferredReader[int] = DeferredReader(SimulatedBackend(streams), (), torch.int64, depth=3)
    load = torch.zeros((), dtype=torch.int64)
    put, come = [], []
    for number in range(50):
        streams.launch(lambda number=number: load.fill_(number))  # type: ignore[misc]
        if reader.put(load, number):
            put.append(number)
        if number % 5 == 0:
            come += reader.ready()
    streams.device.finish()
    come += reader.ready()
    assert [tag for tag, _ in come] == put
    assert [int(value) for _, value in come] == put
    assert 10 < len(put) < 50


def test_a_full_reader_says_so_and_reads_nothing() -> None:
    streams = SimulatedStreams(SimulatedDevice(0))
    reader: DeferredReader[int] = DeferredReader(SimulatedBackend(streams), (1,), torch.int64, depth=2)
    load = torch.zeros(1, dtype=torch.int64)
    assert [reader.put(load, number) for number in range(3)] == [True, True, False]
    streams.device.finish()
    assert [tag for tag, _ in reader.ready()] == [0, 1]
    assert reader.put(load, 3)


def test_a_reader_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        DeferredReader(CpuBackend(), (1,), torch.int64, depth=0)


def test_no_read_becomes_part_of_a_graph_that_is_captured() -> None:
    streams = SimulatedStreams(SimulatedDevice(0, eagerness=0.0))
    reader: DeferredReader[int] = DeferredReader(SimulatedBackend(streams), (1,), torch.int64, depth=1)
    load = torch.zeros(1, dtype=torch.int64)
    streams.is_capturing = True
    with pytest.raises(RuntimeError, match="captured"):
        reader.put(load, 0)
    assert not streams.device.pending(FORWARD)
    streams.is_capturing = False
    assert reader.put(load, 1)
