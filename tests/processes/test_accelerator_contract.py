"""The code that accelerators share keeps the contract in real processes over gloo, its streams simulated.

The sums, exchanges, time-outs and aborts are real; that streams really run later is simulated, each rank with
an order of its own. Nothing here is about a device's numbers, its memory or its speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch.distributed import Store

from eplb_platform.backend import Backend, GroupError, Message, StreamOperations
from eplb_platform.testing.contract import clauses, run_check
from eplb_platform.testing.processes import RankPool
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams
from tests.simulated_backend import SimulatedBackend

pytestmark = pytest.mark.processes


class OtherOrderInEachProcess(SimulatedBackend):
    """Little pinned memory, so that exchanges take several rounds."""

    def __init__(self) -> None:
        super().__init__(pinned_bytes=1 << 20)

    def default_streams(self) -> StreamOperations:
        seed = os.getpid()
        print(f"the order of seed {seed}")  # in the report of a clause that fails
        return SimulatedStreams(SimulatedDevice(seed))


class HandsOutTooEarly(SimulatedBackend):
    """Forgets that what was received is still on its way from pinned memory."""

    def default_streams(self) -> StreamOperations:
        return SimulatedStreams(SimulatedDevice(0, eagerness=0.0))

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        staged = [Message(message.peer, torch.zeros_like(message.tensor)) for message in receives]
        super().exchange(sends, staged)
        for message, early in zip(receives, staged, strict=True):
            message.tensor.copy_(early.tensor)  # at once, and not on the transfer stream


class StreamsWithoutOrder(SimulatedStreams):
    def wait(self, mark: object) -> None:
        pass


class WaitsForNothing(SimulatedBackend):
    def default_streams(self) -> StreamOperations:
        return StreamsWithoutOrder(SimulatedDevice(0, eagerness=0.0))


class ForgetsTheTypeOnTheHost(OtherOrderInEachProcess):
    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=torch.float32)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    with RankPool(1, timeout_s=300.0) as alone, RankPool(2, timeout_s=300.0) as pair:
        yield {1: alone, 2: pair}


@pytest.mark.parametrize(
    ("num_ranks", "clause"), [(ranks, clause) for ranks in (1, 2) for clause in clauses(ranks)]
)
def test_simulated_streams_keep(pools: dict[int, RankPool], num_ranks: int, clause: str) -> None:
    result = run_check(pools[num_ranks], OtherOrderInEachProcess, clause)
    assert result.passed, result.detail


def test_a_clause_between_ranks_is_not_run_by_one(pools: dict[int, RankPool]) -> None:
    with pytest.raises(ValueError, match="needs 2 ranks, got 1"):
        run_check(pools[1], OtherOrderInEachProcess, "exchanges_scattered_tensors")


@pytest.mark.parametrize(
    ("backend", "clause"),
    [
        (HandsOutTooEarly, "exchanges_between_all_pairs_in_order"),
        (WaitsForNothing, "streams_hand_memory_back_and_forth"),
        (ForgetsTheTypeOnTheHost, "host_memory_takes_copies_both_ways"),
    ],
)
def test_a_backend_that_breaks_a_clause_is_found_out(
    pools: dict[int, RankPool], backend: type[Backend], clause: str
) -> None:
    result = run_check(pools[2], backend, clause)
    assert not result.passed
    assert "ContractViolation" in result.detail


def warm_up_with(rank: int, num_ranks: int, store: Store) -> str:
    backend = SimulatedBackend(pinned_bytes=4096 * (1 + rank))
    backend.connect(store, rank, num_ranks, timeout_s=60.0)
    try:
        backend.warm_up()
    except (ValueError, GroupError) as error:
        return str(error)
    finally:
        backend.close()
    return ""


def test_ranks_with_rounds_of_different_size_are_stopped_at_start(pools: dict[int, RankPool]) -> None:
    first, second = pools[2].run(warm_up_with)
    assert second.startswith("rank 1: pinned_bytes is 8192, but 4096 on rank 0")
    assert first.startswith("rank 0: ")
