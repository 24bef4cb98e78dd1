"""The CPU backend keeps the contract, and each clause notices a backend that does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eplb_backends.cpu import CpuBackend
from eplb_platform.backend import Backend, GroupError, Message
from eplb_platform.testing.checks import CHECKS
from eplb_platform.testing.contract import run_check
from eplb_platform.testing.processes import RankPool

pytestmark = pytest.mark.processes

Parameter = Sequence[torch.Tensor] | torch.Tensor


@pytest.fixture(scope="module", params=[2, 4])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param, timeout_s=300.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=300.0, grace_s=10.0) as pool:
        yield pool


@pytest.mark.parametrize("clause", CHECKS)
def test_the_cpu_backend_keeps(pool: RankPool, clause: str) -> None:
    result = run_check(pool, "cpu", clause)
    assert result.passed, result.detail


# --- backends that break one clause each ---


class SumsTwice(CpuBackend):
    def sum_on_host(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return 2 * super().sum_on_host(values)


class BroadcastsInPlace(CpuBackend):
    def broadcast_on_host(self, values: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        values[...] = super().broadcast_on_host(values, source)
        return values


class DropsTheLastMessage(CpuBackend):
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        super().exchange(sends[:-1], receives[:-1])


class TurnsMessagesAround(CpuBackend):
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        by_size = sorted(receives, key=lambda message: message.tensor.numel())
        by_size[1:3] = by_size[2:0:-1]
        super().exchange(sorted(sends, key=lambda message: message.tensor.numel()), by_size)


class KnowsOnlyHalves(CpuBackend):
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        halves = [Message(message.peer, message.tensor.half()) for message in receives]
        super().exchange([Message(message.peer, message.tensor.half()) for message in sends], halves)
        for message, half in zip(receives, halves, strict=True):
            message.tensor.copy_(half.tensor)


class FillsCopies(CpuBackend):
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        super().exchange(sends, [Message(message.peer, message.tensor.contiguous()) for message in receives])


class NeedsAMessage(CpuBackend):
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        super().exchange(sends, [receives[0], *receives[1:]])


class ReturnsBeforeItHasSent(CpuBackend):
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        def later() -> None:
            CpuBackend.exchange(self, sends, receives)

        worker = threading.Timer(0.25, later)
        worker.start()
        worker.join(0.01 if sends and sends[0].tensor.numel() > 100_000 else None)


class IgnoresAbort(CpuBackend):
    def abort(self) -> None:
        pass

    def close(self) -> None:
        CpuBackend.abort(self)


class ReceivesAfterAbort(CpuBackend):
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        try:
            super().exchange(sends, receives)
        except GroupError:
            threading.Thread(target=self._receive_late, args=(receives,), daemon=True).start()
            raise

    def _receive_late(self, receives: Sequence[Message]) -> None:
        for moment in range(100):
            time.sleep(0.01)
            for message in receives:
                message.tensor.fill_(moment)


class HidesTheTimeOut(CpuBackend):
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        try:
            super().exchange(sends, receives)
        except GroupError:
            return


class CannotRebuild(CpuBackend):
    def rebuild(self, epoch: int) -> None:
        super().rebuild(min(epoch, 1))


class ClosesOnce(CpuBackend):
    closed: ClassVar[bool] = False

    def close(self) -> None:
        if self._group is None:
            raise RuntimeError("already closed")
        super().close()


class StagesOneTensor(CpuBackend):
    def allocate_staging(self, parameter: Parameter, slots: int) -> Sequence[torch.Tensor]:
        return [torch.zeros_like(parameter[0])] * slots


class StagesFloats(CpuBackend):
    def allocate_staging(self, parameter: Parameter, slots: int) -> Sequence[torch.Tensor]:
        return [torch.zeros(parameter[0].shape) for _ in range(slots)]


class IgnoresRows(CpuBackend):
    def swap_in(
        self, parameter: Parameter, slots: Sequence[int], staging: Sequence[torch.Tensor], rows: Sequence[int]
    ) -> None:
        super().swap_in(parameter, slots, staging, range(len(slots)))


class SumsOneByte(CpuBackend):
    def checksum(self, tensors: Sequence[torch.Tensor]) -> int:
        return super().checksum([tensors[0].reshape(-1)[:1]])


class SaltsTheChecksum(CpuBackend):
    def checksum(self, tensors: Sequence[torch.Tensor]) -> int:
        return super().checksum(tensors) ^ self._rank


class CountsPadding(CpuBackend):
    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        physical = super().map_and_record(logical_ids, logical_to_physical, replica_count, None, offset)
        if load is not None:
            load += torch.bincount(physical.flatten().clamp(min=0), minlength=load.numel())
        return physical


class CountsNothing(CpuBackend):
    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        return super().map_and_record(logical_ids, logical_to_physical, replica_count, None, offset)


class ChoosesByRow(CpuBackend):
    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        rows = torch.arange(logical_ids.shape[0]).unsqueeze(1)
        experts = logical_ids.long().clamp(min=0)
        chosen = logical_to_physical[experts, rows % replica_count[experts]].long()
        physical = chosen.masked_fill(logical_ids < 0, -1)
        if load is not None:
            load += torch.bincount(physical[physical >= 0], minlength=load.numel())
        return physical


class ChoosesPadding(CpuBackend):
    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        return super().map_and_record(logical_ids, logical_to_physical, replica_count + 1, load, offset)


class NeverTheSame(CpuBackend):
    calls = 0

    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        self.calls += 1
        return super().map_and_record(logical_ids, logical_to_physical, replica_count, load, self.calls)


BROKEN: list[tuple[type[Backend], str]] = [
    (SumsTwice, "sums_on_host"),
    (BroadcastsInPlace, "broadcasts_on_host"),
    (DropsTheLastMessage, "exchanges_between_all_pairs_in_order"),
    (TurnsMessagesAround, "exchanges_between_all_pairs_in_order"),
    (KnowsOnlyHalves, "exchanges_every_type_of_weight"),
    (FillsCopies, "exchanges_scattered_tensors"),
    (NeedsAMessage, "exchanges_little_or_nothing"),
    (ReturnsBeforeItHasSent, "sent_tensors_may_change_after_exchange"),
    (IgnoresAbort, "an_aborted_group_works_again_after_rebuild"),
    (ReceivesAfterAbort, "nothing_is_received_after_abort"),
    (HidesTheTimeOut, "a_missing_rank_ends_the_others_by_time_out"),
    (CannotRebuild, "an_aborted_group_works_again_after_rebuild"),
    (ClosesOnce, "close_may_be_repeated"),
    (StagesOneTensor, "staging_rows_are_apart"),
    (StagesFloats, "staging_is_like_the_parameter"),
    (IgnoresRows, "swap_in_writes_the_rows_into_the_slots"),
    (SumsOneByte, "checksums_tell_bytes_apart"),
    (SaltsTheChecksum, "checksums_tell_bytes_apart"),
    (CountsPadding, "padding_stays_and_is_not_counted"),
    (CountsNothing, "mapping_counts_what_it_maps"),
    (ChoosesByRow, "replicas_share_evenly"),
    (ChoosesByRow, "the_offset_moves_the_first_choice"),
    (ChoosesPadding, "mapping_names_a_replica_of_each_expert"),
    (NeverTheSame, "mapping_is_repeatable"),
]


@pytest.mark.parametrize(("backend", "clause"), BROKEN)
def test_a_backend_that_breaks_a_clause_is_found_out(
    pair: RankPool, backend: type[Backend], clause: str
) -> None:
    result = run_check(pair, backend, clause)
    assert not result.passed
    assert "rank " in result.detail
