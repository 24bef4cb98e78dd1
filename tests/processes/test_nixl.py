"""Weights by NIXL between real processes, in host memory, the streams of the ranks simulated.

The library is real, over what UCX finds on this machine: shared memory, TCP. What it does with memory of a
device is not shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from threading import Timer

import pytest
import torch
from torch.distributed import Store

from eplb_backends.accelerator import nixl_library
from eplb_platform.backend import GroupError, Message, StreamOperations
from eplb_platform.testing.contract import clauses, run_check
from eplb_platform.testing.processes import RankPool
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams
from tests.simulated_backend import SimulatedBackend

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not nixl_library.is_installed(), reason="NIXL is not installed here: make nixl-tests has it"
    ),
]

_MEGABYTE = 1 << 20


class ByNixl(SimulatedBackend):
    """Small rooms, so that exchanges take several rounds."""

    def __init__(self, transport: str = "nixl") -> None:
        super().__init__(transport=transport, pinned_bytes=_MEGABYTE)

    def default_streams(self) -> StreamOperations:
        seed = os.getpid()
        print(f"the order of seed {seed}")  # in the report of a clause that fails
        return SimulatedStreams(SimulatedDevice(seed))


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    with (
        RankPool(1, timeout_s=150.0) as alone,
        RankPool(2, timeout_s=150.0) as pair,
        RankPool(3, timeout_s=150.0) as three,
    ):
        yield {1: alone, 2: pair, 3: three}


@pytest.mark.parametrize(
    ("num_ranks", "clause"), [(ranks, clause) for ranks in (1, 2, 3) for clause in clauses(ranks)]
)
def test_the_contract_is_kept(pools: dict[int, RankPool], num_ranks: int, clause: str) -> None:
    result = run_check(pools[num_ranks], ByNixl, clause)
    assert result.passed, result.detail


def connected(store: Store, rank: int, num_ranks: int, *, transport: str, timeout_s: float) -> ByNixl:
    backend = ByNixl(transport)
    backend.connect(store, rank, num_ranks, timeout_s)
    backend.warm_up()
    return backend


def swap_with_peer(backend: ByNixl, rank: int, nbytes: int = 3 * _MEGABYTE) -> torch.Tensor:
    sent = torch.full((nbytes,), 10 + rank, dtype=torch.uint8)
    received = torch.zeros_like(sent)
    with backend.streams.transfer():
        backend.exchange([Message(1 - rank, sent)], [Message(1 - rank, received)])
    assert isinstance(backend.streams, SimulatedStreams)
    backend.streams.device.finish()
    return received


def what_moves_them(rank: int, num_ranks: int, store: Store, transports: list[str]) -> tuple[str, str, int]:
    backend = connected(store, rank, num_ranks, transport=transports[rank], timeout_s=10.0)
    try:
        received = swap_with_peer(backend, rank)
        assert (received == 11 - rank).all()
        return backend.transport, backend.collective, len(backend._nixl_group._received)  # type: ignore
    except AttributeError:
        return backend.transport, backend.collective, 0
    finally:
        backend.close()


@pytest.mark.parametrize("transports", [["auto", "auto"], ["nixl", "auto"]])
def test_auto_is_nixl_where_all_ranks_have_it(pools: dict[int, RankPool], transports: list[str]) -> None:
    assert pools[2].run(what_moves_them, transports) == [("nixl", "nixl", 1)] * 2


def test_auto_is_host_where_a_rank_goes_by_host(pools: dict[int, RankPool]) -> None:
    assert pools[2].run(what_moves_them, ["auto", "host"]) == [("host", "gloo", 0)] * 2


def refusal(rank: int, num_ranks: int, store: Store, transports: list[str]) -> str:
    try:
        connected(store, rank, num_ranks, transport=transports[rank], timeout_s=10.0).close()
    except (ValueError, GroupError) as error:
        return str(error)
    return ""


def test_nixl_that_was_asked_for_is_refused_where_a_rank_goes_by_host(pools: dict[int, RankPool]) -> None:
    refused, other = pools[2].run(refusal, ["nixl", "host"])
    assert refused == "rank 0: no transport 'nixl': rank 1: transport 'host'"
    assert other


def without_library(rank: int, num_ranks: int, store: Store) -> tuple[str, str]:
    if rank == 1:

        def fails(name: str) -> None:
            raise RuntimeError("no plugin")

        nixl_library.new_agent, kept = fails, nixl_library.new_agent  # type: ignore[assignment]
    try:
        return what_moves_them(rank, num_ranks, store, ["auto", "auto"])[:2]
    finally:
        if rank == 1:
            nixl_library.new_agent = kept


def test_auto_is_host_on_all_ranks_where_the_library_does_not_start_on_one(
    pools: dict[int, RankPool],
) -> None:
    assert pools[2].run(without_library) == [("host", "gloo")] * 2


def receive_late(rank: int, num_ranks: int, store: Store) -> tuple[float, bool, bool]:
    backend = connected(store, rank, num_ranks, transport="nixl", timeout_s=1.5)
    received = torch.zeros(_MEGABYTE, dtype=torch.uint8)
    begun = time.monotonic()
    took = 0.0
    if rank == 1:
        store.wait(["rank 0 has given up"])
    with backend.streams.transfer():
        try:
            backend.exchange([], [Message(1 - rank, received)])
        except GroupError:
            took = time.monotonic() - begun
            store.set("rank 0 has given up", "")
    backend.abort()
    untouched = not received.any()
    backend.rebuild(epoch=1)
    works_again = bool((swap_with_peer(backend, rank) == 11 - rank).all())
    backend.close()
    return took, untouched, works_again


def test_a_late_rank_ends_the_exchange_in_time_and_a_new_epoch_works(pools: dict[int, RankPool]) -> None:
    (took, *first), (_, *second) = pools[2].run(receive_late)
    assert 1.4 < took < 4.0
    assert first == second == [True, True]


def send_and_leave(rank: int, num_ranks: int, store: Store) -> float:
    """Rank 0 sends only, rank 1 receives only; whoever is done says nothing any more."""
    backend = connected(store, rank, num_ranks, transport="nixl", timeout_s=20.0)
    tensor = torch.full((2 * _MEGABYTE,), 1 - rank, dtype=torch.uint8)
    message = Message(1 - rank, tensor)
    slowest = 0.0
    for _ in range(20):
        begun = time.monotonic()
        with backend.streams.transfer():
            backend.exchange(*(([message], []) if rank == 0 else ([], [message])))
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.05)
    backend.close()
    return slowest


def test_a_sender_is_done_though_its_receiver_is_elsewhere_by_then(pools: dict[int, RankPool]) -> None:
    assert max(pools[2].run(send_and_leave)) < 10.0


def die_in_exchange(rank: int, num_ranks: int, store: Store) -> tuple[float, bool]:
    backend = connected(store, rank, num_ranks, transport="nixl", timeout_s=20.0)
    if rank == 1:
        Timer(0.5, os._exit, [9]).start()
        time.sleep(10.0)
    received = torch.zeros(_MEGABYTE, dtype=torch.uint8)
    begun = time.monotonic()
    try:
        with backend.streams.transfer():
            backend.exchange([Message(1, received)], [Message(1, received)])
    except GroupError:
        pass
    took = time.monotonic() - begun
    backend.close()
    return took, not received.any()


def test_a_rank_that_dies_ends_the_exchange() -> None:
    with RankPool(2, timeout_s=60.0) as pool:
        survivor, dead = pool.outcomes(die_in_exchange)
    assert dead.error is not None and survivor.value is not None, survivor.error
    took, untouched = survivor.value
    assert took < 10.0 and untouched


def over_tcp(rank: int, num_ranks: int, store: Store) -> tuple[str, str, int]:
    os.environ["UCX_TLS"] = "tcp,self"  # before the library is there
    return what_moves_them(rank, num_ranks, store, ["nixl", "nixl"])


def test_ranks_without_common_memory_go_by_tcp() -> None:
    with RankPool(2, timeout_s=60.0) as pool:
        assert pool.run(over_tcp) == [("nixl", "nixl", 1)] * 2
