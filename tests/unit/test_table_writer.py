"""Tables are written through one piece of host memory, which is not used again before its copies are done."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eplb_platform.integrations.vllm import table_writer
from eplb_platform.integrations.vllm.table_writer import TableWriter
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams
from tests.simulated_backend import SimulatedBackend


@pytest.mark.parametrize("seed", range(50))
def test_every_row_arrives_whatever_the_stream_does(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(table_writer, "ROOM_ENTRIES", 20)
    device = SimulatedDevice(seed)
    writer = TableWriter(SimulatedBackend(SimulatedStreams(device)), torch.int64)
    table = torch.zeros(4, 2, 3, dtype=torch.int64)
    expected = torch.zeros_like(table)
    for commit in range(12):
        layers = [commit % 4, (commit + 1) % 4]
        rows = np.arange(12, dtype=np.int32).reshape(2, 2, 3) + 100 * commit
        writer.write(table, layers, rows)
        expected[layers] = torch.from_numpy(rows).long()
        rows[:] = -7
    device.finish()
    assert torch.equal(table, expected)


def test_a_row_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_writer, "ROOM_ENTRIES", 5)
    writer = TableWriter(SimulatedBackend(SimulatedStreams(SimulatedDevice(0))), torch.int64)
    with pytest.raises(ValueError, match="6 entries does not fit in 5"):
        writer.write(torch.zeros(1, 2, 3, dtype=torch.int64), [0], np.zeros((1, 2, 3), np.int32))
