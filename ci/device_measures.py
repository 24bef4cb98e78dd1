"""What ranks do for `ci/on_device.py`: hand experts over to each other, and copy as much beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.distributed import Store

from eplb_platform.backend import Backend, Message, load_backend

EXPERTS = 8
EXPERT_BYTES = 32 * 2**20
REPEATS = 5


@dataclass(frozen=True)
class Bandwidth:
    """GB/s of one rank; the best of `REPEATS`."""

    exchange_and_swap: float
    plain_copy: float


def measure_bandwidth(rank: int, num_ranks: int, store: Store, backend: str, transport: str) -> Bandwidth:
    """Every rank hands all its experts to the next one and takes those of the one before in their place."""
    number = rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(number)
    made = load_backend(backend, transport=transport)
    device = torch.device(made.device_type, number)
    experts = torch.full((EXPERTS, EXPERT_BYTES), rank, dtype=torch.uint8, device=device)
    made.connect(store, rank, num_ranks, timeout_s=120.0)
    try:
        made.warm_up()
        staging = list(made.allocate_staging(experts, EXPERTS))
        swap = min(_hand_over(made, experts, staging, rank, num_ranks) for _ in range(REPEATS))
        copy = min(_copy(experts) for _ in range(REPEATS))
    finally:
        made.close()
    total = EXPERTS * EXPERT_BYTES / 1e9
    return Bandwidth(total / swap, total / copy)


def _hand_over(
    backend: Backend, experts: torch.Tensor, staging: list[torch.Tensor], rank: int, num_ranks: int
) -> float:
    after, before = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    expected = int(experts[0, 0])
    torch.accelerator.synchronize()
    started = time.perf_counter()
    sends = [Message(after, expert) for expert in experts]
    receives = [Message(before, staged) for staged in staging]
    with backend.streams.transfer():
        backend.exchange(sends, receives)
        backend.swap_in(experts, range(EXPERTS), staging, range(EXPERTS))
    torch.accelerator.synchronize()
    taken = time.perf_counter() - started
    _check(int(experts[0, 0]), (expected - 1) % num_ranks)
    return taken


def _copy(experts: torch.Tensor) -> float:
    target = torch.empty_like(experts)
    torch.accelerator.synchronize()
    started = time.perf_counter()
    target.copy_(experts)
    torch.accelerator.synchronize()
    return time.perf_counter() - started


def _check(found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"an expert of rank {found} arrived in place of one of rank {expected}")
