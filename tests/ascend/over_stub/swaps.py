"""Experts that change places between ranks, on streams that dawdle: what goes wrong, in words."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import Store

from eplb_backends.ascend import AscendBackend
from eplb_platform.backend import Message
from tests.ascend.over_stub.hccl_groups import NZ
from tests.ascend.over_stub.recorded import calls_of, of_hccl

SHAPE = (30, 50)
STORED = 2048
"""Elements that a tensor of this shape has in NZ, in halves."""
SLOTS = 3
ROUNDS = 6
DAWDLE_US = 20_000


@contextmanager
def connected(rank: int, num_ranks: int, store: Store, transport: str) -> Iterator[AscendBackend]:
    torch.npu.set_device(rank)
    torch.npu.config.allow_internal_format = True
    backend = AscendBackend(transport=transport, pinned_bytes=num_ranks * 4096)
    backend.connect(store, rank, num_ranks, timeout_s=300.0)
    try:
        backend.warm_up()
        yield backend
    finally:
        dawdle(1, 100)
        backend.close()


def swap(rank: int, num_ranks: int, store: Store, layout: str, transport: str) -> list[str]:
    """Round after round every rank takes the experts of the one before, while its streams are behind."""
    with connected(rank, num_ranks, store, transport) as backend:
        own = _parameter(layout)
        addresses = [expert.data_ptr() for expert in own]
        faults: list[str] = []
        for number in range(ROUNDS):
            dawdle(number, DAWDLE_US)
            asked = calls_of(
                lambda number=number: faults.extend(_round(backend, own, rank, num_ranks, number))
            )
            counts = {call["count"] for call in of_hccl(asked) if call.get("data_type") == 3}
            if layout == "nz" and transport == "collective" and counts != {STORED}:
                faults.append(f"HCCL was asked for {counts} elements")
        if [expert.data_ptr() for expert in own] != addresses:
            faults.append("weights lie elsewhere")
        return faults


def _round(
    backend: AscendBackend, own: list[torch.Tensor] | torch.Tensor, rank: int, num_ranks: int, number: int
) -> list[str]:
    after, before = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    streams = backend.streams
    for slot in range(SLOTS):
        own[slot].copy_(_like(own, values_of(rank, number, slot)))
    written = streams.record()
    with streams.transfer():
        streams.wait(written)
        staging = backend.allocate_staging(own, SLOTS)
        backend.exchange(
            [Message(after, expert) for expert in own], [Message(before, staged) for staged in staging]
        )
        received = streams.record()
    streams.wait(received)
    backend.swap_in(own, range(SLOTS), staging, range(SLOTS))
    sums = backend.checksum(list(own))
    right = [values_of(before, number, slot) for slot in range(SLOTS)]
    faults = [
        f"slot {slot} holds something else"
        for slot, expert in enumerate(right)
        if not torch.equal(own[slot].cpu(), expert)
    ]
    plain = torch.stack(right).npu()
    torch.npu.synchronize()
    if backend.checksum(list(plain)) != sums:
        faults.append("the checksum is another one")
    return faults


def _parameter(layout: str) -> list[torch.Tensor] | torch.Tensor:
    if layout == "stacked":
        return torch.zeros(SLOTS, *SHAPE, dtype=torch.float16, device="npu")
    return [to_nz(torch.zeros(SHAPE, dtype=torch.float16)) for _ in range(SLOTS)]


def _like(own: list[torch.Tensor] | torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values.npu() if isinstance(own, torch.Tensor) else to_nz(values)


def to_nz(values: torch.Tensor) -> torch.Tensor:
    return torch.ops.npu.npu_format_cast(values.npu(), NZ)


def values_of(rank: int, number: int, slot: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * rank + 100 * number + slot)
    return torch.randn(SHAPE, generator=generator).half()


def dawdle(seed: int, most_us: int) -> None:
    ctypes.CDLL("libascendcl.so").cann_stub_set_delay(ctypes.c_uint64(seed), ctypes.c_int64(most_us))
