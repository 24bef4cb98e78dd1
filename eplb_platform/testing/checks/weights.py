"""Clauses about staging, swapping and checking an expert's weights, and about the streams they use."""

from __future__ import annotations

import time

import torch

from eplb_platform.testing.checks import Site, check, require, require_equal


@check(connected=False)
def staging_is_like_the_parameter(site: Site) -> None:
    """`allocate_staging` gives one tensor for each slot, of an expert's shape, type and device."""
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        stacked = torch.zeros(6, 2, 3, device=site.device).to(dtype)
        for parameter in (stacked, [expert.clone() for expert in stacked]):
            for slots in (0, 1, 4):
                staging = site.backend.allocate_staging(parameter, slots)
                require(len(staging) == slots, f"{len(staging)} tensors for {slots} slots")
                for row in range(slots):
                    kind = staging[row].shape, staging[row].dtype, staging[row].device.type
                    require(kind == (stacked[0].shape, dtype, site.device.type), f"staging is {kind}")


@check(connected=False)
def staging_rows_are_apart(site: Site) -> None:
    """Writing one staged expert changes no other, nor the parameter."""
    parameter = torch.zeros(4, 5, device=site.device)
    staging = site.backend.allocate_staging(parameter, 3)
    for row in range(3):
        staging[row].fill_(row + 1)
    for row in range(3):
        require_equal(staging[row], torch.full_like(parameter[0], row + 1), f"row {row}")
    require_equal(parameter, torch.zeros_like(parameter), "the parameter")


@check(connected=False)
def swap_in_writes_the_rows_into_the_slots(site: Site) -> None:
    """`swap_in` overwrites in place exactly the slots it is given, of stacked and of separate tensors."""
    for slots, rows in (([1, 2, 3], [0, 1, 2]), ([5, 0], [2, 0]), ([4], [3]), ([2, 3], [3, 2]), ([], [])):
        for separate in (False, True):
            _swap_and_compare(site, slots, rows, separate)


def _swap_and_compare(site: Site, slots: list[int], rows: list[int], separate: bool) -> None:
    stacked = torch.arange(24.0, device=site.device).reshape(6, 4)
    parameter = list(stacked.clone().unbind(0)) if separate else torch.nn.Parameter(stacked.clone())
    addresses = [parameter[slot].data_ptr() for slot in range(6)]
    staging = site.backend.allocate_staging(parameter, 4)
    for row in range(4):
        staging[row].fill_(100 + row)
    site.backend.swap_in(parameter, slots, staging, rows)
    site.settle()
    for slot, row in zip(slots, rows, strict=True):
        stacked[slot] = 100 + row
    for slot in range(6):
        require_equal(parameter[slot], stacked[slot], f"slot {slot} after rows {rows} went to slots {slots}")
    require(addresses == [parameter[slot].data_ptr() for slot in range(6)], "an expert's address changed")


@check(connected=True)
def checksums_tell_bytes_apart(site: Site) -> None:
    """`checksum` has 63 bits, is the same everywhere for equal bytes, and another for a bit or an order."""
    first = torch.arange(3000.0, device=site.device).reshape(50, 60)
    second = (torch.arange(64, device=site.device) - 30).to(torch.int8)
    value = site.backend.checksum([first, second])
    require(0 <= value < 2**63, f"{value} has more than 63 bits")
    flipped = second.clone()
    flipped[63] ^= 1
    exchanged = first.flip(0)
    others = [[second, first], [first, flipped], [exchanged, second], [first]]
    for tensors in others:
        require(site.backend.checksum(tensors) != value, "different bytes have one checksum")
    require(site.backend.checksum([exchanged.flip(0), second.clone()]) == value, "equal bytes differ")
    scattered = torch.zeros(60, 50, device=site.device).copy_(first.t()).t()
    require(site.backend.checksum([scattered, second]) == value, "the checksum depends on strides")
    require(site.backend.checksum([first.to(torch.bfloat16)]) != site.backend.checksum([first]), "bfloat16")
    _require_equal_on_all_ranks(site, value)


def _require_equal_on_all_ranks(site: Site, value: int) -> None:
    site.store.set(f"checksum/{site.rank}", str(value))
    site.meet("checksums")
    for rank in range(site.num_ranks):
        other = int(site.store.get(f"checksum/{rank}"))
        require(other == value, f"checksum {value} here, {other} on rank {rank}")


@check(connected=False)
def streams_keep_the_order_of_marks(site: Site) -> None:
    """A stream that waits for a mark sees what was copied before it, and the mark passes in the end."""
    streams = site.backend.streams
    source = torch.arange(1e6, device=site.device)
    target = torch.zeros_like(source)
    before = streams.record()
    with streams.transfer():
        streams.wait(before)
        streams.copy(target, source)
        mark = streams.record()
    streams.wait(mark)
    site.settle()
    require_equal(target, source, "what was copied on the transfer stream")
    require(streams.passed(mark), "a later mark has passed, and one before it has not")


@check(connected=False)
def streams_hand_memory_back_and_forth(site: Site) -> None:
    """Staging is filled on one stream and read on the other, again and again, with marks in between."""
    streams = site.backend.streams
    sources = [torch.full((100_000,), float(round_), device=site.device) for round_ in range(8)]
    staging = torch.zeros_like(sources[0])
    targets = [torch.zeros_like(staging) for _ in sources]
    is_free = streams.record()
    for source, target in zip(sources, targets, strict=True):
        with streams.transfer():
            streams.wait(is_free)
            streams.copy(staging, source)
            is_filled = streams.record()
        streams.wait(is_filled)
        streams.copy(target, staging)
        is_free = streams.record()
    site.settle()
    for round_, (source, target) in enumerate(zip(sources, targets, strict=True)):
        require_equal(target, source, f"round {round_}")


@check(connected=False)
def host_memory_takes_copies_both_ways(site: Site) -> None:
    """`streams.copy` takes tensors to memory of `allocate_on_host` and back, whatever their type."""
    streams = site.backend.streams
    for dtype in (torch.int64, torch.float32, torch.bfloat16, torch.uint8):
        source = torch.arange(60, device=site.device).reshape(5, 12).to(dtype)
        target = torch.zeros_like(source)
        on_host = site.backend.allocate_on_host((5, 12), dtype)
        kind = tuple(on_host.shape), on_host.dtype, on_host.device.type
        require(kind == ((5, 12), dtype, "cpu"), f"host memory is {kind}")
        streams.copy(on_host, source)
        streams.copy(target, on_host)
        site.settle()
        require_equal(on_host, source, "the copy on the host")
        require_equal(target, source, "the copy that came back")


@check(connected=False)
def a_timer_measures_from_start_to_stop(site: Site) -> None:
    """`elapsed_ms` is None before both points are passed, then a time that is not negative."""
    timer = site.backend.timer()
    require(timer.elapsed_ms() is None, "a timer that was never started has measured something")
    timer.start()
    require(timer.elapsed_ms() is None, "a timer that runs has measured something")
    time.sleep(0.02)
    timer.stop()
    deadline = time.monotonic() + site.timeout_s
    while (elapsed := timer.elapsed_ms()) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    require(elapsed is not None and elapsed >= 0, f"elapsed is {elapsed} ms")
