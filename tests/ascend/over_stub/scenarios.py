"""What ranks do with the Ascend backend on `npu` devices, and what goes wrong with it, in words.

Each gives the faults that this rank saw: none, unless the backend is mutated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch
from torch.distributed import Store

from eplb_backends.ascend import AscendBackend
from eplb_platform.backend import GroupError, Message
from tests.ascend.over_stub.mutations import Mutation, mutated
from tests.ascend.over_stub.refusals import refusals
from tests.ascend.over_stub.swaps import connected, dawdle, swap

Scenario = Callable[[int, int, Store], list[str]]

MUCH_US = 20_000
TRIES = 20
ABORTS = 8


def faults_of(
    rank: int, num_ranks: int, store: Store, scenario: str, mutation: Mutation | None = None
) -> list[str]:
    with mutated(mutation):
        try:
            return SCENARIOS[scenario](rank, num_ranks, store)
        finally:
            dawdle(1, 100)


def _freed_memory(rank: int, num_ranks: int, store: Store) -> list[str]:
    """The forward thread gives back what the transfer stream has still to read, and takes memory again."""
    torch.npu.set_device(rank)
    backend, faults = AscendBackend(), []
    target = torch.zeros(5000, device="npu")
    for number in range(TRIES // 2):
        source = torch.full((5000,), float(number), device="npu")
        written = backend.streams.record()
        torch.npu.synchronize()
        dawdle(number, MUCH_US)
        with backend.streams.transfer():
            backend.streams.wait(written)
            backend.streams.copy(target, source)
        del source
        torch.full((5000,), -1.0, device="npu")
        torch.npu.synchronize()
        if not bool((target.cpu() == number).all()):
            faults.append(f"copy {number} read memory that was another's")
    return faults


def _timer(rank: int, num_ranks: int, store: Store) -> list[str]:
    """torch_npu waits for the events where it is asked for the time between them too early."""
    torch.npu.set_device(rank)
    waited = 0
    for number in range(TRIES):
        dawdle(number, MUCH_US)
        timer = AscendBackend().timer()
        timer.start()
        timer.stop()
        is_pending = not timer._stopped.query()  # type: ignore[attr-defined]
        waited += is_pending and timer.elapsed_ms() is not None
    return [f"{waited} of {TRIES} timers were waited for"] if waited > TRIES // 4 else []


def _failing_exchange(rank: int, num_ranks: int, store: Store) -> list[str]:
    """The exchange fails as the device is late; nothing may be pending on the transfer stream then."""
    faults = []
    with connected(rank, num_ranks, store, "host") as backend:
        backend._timeout_s = 0.001
        weight = torch.ones(3, 100, device="npu").t()
        torch.npu.synchronize()
        for number in range(TRIES):
            dawdle(number, 2 * MUCH_US)
            peer = (rank + 1) % num_ranks
            try:
                with backend.streams.transfer():
                    backend.exchange([Message(peer, weight)], [])
            except GroupError:
                if not backend.streams._transfer.query():  # type: ignore[attr-defined]
                    faults.append(f"exchange {number} failed and left copies behind")
        torch.npu.synchronize()
    return faults


def _unanswered(rank: int, num_ranks: int, store: Store) -> list[str]:
    """By HCCL, to a rank that sends nothing: our time-out has to end it."""
    with connected(rank, num_ranks, store, "collective") as backend:
        backend._timeout_s = 0.5
        faults = []
        if rank == 0:
            try:
                with backend.streams.transfer():
                    backend.exchange([], [Message(1, torch.zeros(5, device="npu"))])
                faults.append("an exchange that nobody answers has ended well")
            except GroupError as error:
                if str(error) != "rank 0: exchange: the device was not done within 0.5 s":
                    faults.append(str(error))
        store.set(f"done{rank}", "1")
        store.wait([f"done{other}" for other in range(num_ranks)])
        backend.abort()
        return faults


def _abort(rank: int, num_ranks: int, store: Store, transport: str) -> list[str]:
    """Again and again, in the middle of an exchange: what was to be received into keeps what it has then."""
    faults: list[str] = []
    peer = (rank + 1) % num_ranks
    with connected(rank, num_ranks, store, transport) as backend, ThreadPoolExecutor(1) as background:
        for epoch in range(1, 1 + ABORTS):
            sent, received = (value * torch.ones(100, 200, device="npu") for value in (epoch, -epoch))
            if backend.enqueues_on_forward:  # what does not lie together is copied behind HCCL
                received = received.t()
                sent = sent.t()
            torch.npu.synchronize()
            dawdle(epoch, MUCH_US)
            exchange = background.submit(_exchange, backend, Message(peer, sent), Message(peer, received))
            time.sleep(0.01 * (epoch + rank))
            backend.abort()
            seen = received.cpu()
            exchange.result()
            torch.npu.synchronize()
            if not torch.equal(received.cpu(), seen):
                faults.append(f"a tensor was written after abort {epoch}")
            dawdle(1, 100)
            backend.rebuild(epoch)
            if backend.enqueues_on_forward:
                backend.open_exchange(epoch)
    return faults


def _exchange(backend: AscendBackend, sent: Message, received: Message) -> None:
    with suppress(GroupError), backend.streams.transfer():
        while True:
            backend.exchange([sent], [received])


SCENARIOS: Mapping[str, Scenario] = {
    "swap of a stack by the host": partial(swap, layout="stacked", transport="host"),
    "swap of a stack by HCCL": partial(swap, layout="stacked", transport="collective"),
    "swap of NZ by the host": partial(swap, layout="nz", transport="host"),
    "swap of NZ by HCCL": partial(swap, layout="nz", transport="collective"),
    "memory given back while it is read": _freed_memory,
    "a timer on a stream that dawdles": _timer,
    "an exchange that fails while its copies are pending": _failing_exchange,
    "an exchange that nobody answers": _unanswered,
    "an abort by the host": partial(_abort, transport="host"),
    "an abort by HCCL": partial(_abort, transport="collective"),
    "refusals": lambda rank, num_ranks, store: refusals(rank),
}
