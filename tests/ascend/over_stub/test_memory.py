"""Tensors and streams of the vendor's torch_npu: what runs later, and what the stub refuses by name."""

from __future__ import annotations

import os
import sys

import torch
from torch.distributed import Store

from eplb_backends.ascend import AscendBackend
from eplb_platform.testing.processes import RankPool
from tests.ascend.over_stub.swaps import dawdle

MOST_COPIES = 2000
"""On a busy machine this thread may be slower than the streams, time and again."""


def test_copies_go_every_way_and_streams_run_later(pair: RankPool) -> None:
    assert pair.run(copies) == [[], []]


def copies(rank: int, num_ranks: int, store: Store) -> list[str]:
    torch.npu.set_device(rank)
    values = torch.randn(300, 70)
    there = torch.empty_like(values, device="npu")
    there.copy_(values)
    beside = torch.empty_like(there).copy_(there.t().contiguous().t())
    faults = [] if torch.equal(beside.cpu(), values) else ["a copy there and back is another"]
    pinned = torch.zeros(300, 70, pin_memory=True)
    stream, event = torch.npu.Stream(), torch.npu.Event()
    torch.npu.synchronize()
    pending = early = 0
    for number in range(MOST_COPIES):
        dawdle(number, 20_000)
        pinned.zero_()
        with torch.npu.stream(stream):
            pinned.copy_(there, non_blocking=True)
            event.record()
        pending += not event.query()
        early += not torch.equal(pinned, values)
        event.synchronize()
        if not torch.equal(pinned, values):
            faults.append("an event passed before the copy in front of it")
        if number >= 20 and pending >= 5 and early >= 5:
            break
    else:
        faults.append(f"{pending} events were pending, {early} copies were late: nothing runs later")
    dawdle(1, 100)
    return faults


def test_an_operator_that_the_stub_lacks_is_refused_by_name(pair: RankPool) -> None:
    for outcome in pair.outcomes(unknown_operator):
        assert outcome.error is not None
        assert "[cann_stub] the stub has no operator Erfinv" in outcome.error


def unknown_operator(rank: int, num_ranks: int, store: Store) -> None:
    """The device is lost to torch_npu afterwards, hence the end of the process."""
    torch.npu.set_device(rank)
    try:
        torch.zeros(3).npu().erfinv()
        torch.npu.synchronize()
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
    os._exit(3)


def test_no_memory_left_is_said_in_one_line_with_what_to_do(pair: RankPool) -> None:
    for text in pair.run(too_much_staging):
        assert text.startswith("NPU out of memory. Tried to allocate 1.00 GiB")
        assert "the device has no memory left: make staging_memory_mb" in text
        assert len(text.splitlines()) == 1


def too_much_staging(rank: int, num_ranks: int, store: Store) -> str:
    """The stub's devices have 2 GiB."""
    torch.npu.set_device(rank)
    try:
        AscendBackend().allocate_staging([torch.empty(2**28, device="npu")], 2)
    except torch.OutOfMemoryError as error:
        return str(error)
    return "there was enough"
