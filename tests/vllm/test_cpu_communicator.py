"""Dispatch and combine between ranks with different numbers of tokens, over gloo in real processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from eplb_platform.testing.processes import RankError, RankPool

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

if not current_platform.is_cpu():
    pytest.skip("vLLM is not built for CPUs", allow_module_level=True)

START_S = 600.0
"""Each rank imports vLLM once: half a minute, and more where the machine is busy."""
NUM_RANKS = 3
GATHERED = [(torch.bfloat16, 5), (torch.float32, 3), (torch.int32, 3), (torch.int64, 1)]
"""Types and widths of what is gathered together: rows that do not fill whole words among them."""

pytestmark = [pytest.mark.processes, pytest.mark.timeout(START_S + 30)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=START_S) as pool:
        yield pool


@contextmanager
def communicator(rank: int, store: dist.Store, num_members: int) -> Iterator[CpuCommunicator]:
    """vLLM's own communicator for a data-parallel group of the first ranks."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    from eplb_platform.integrations.vllm import cpu_communicator

    cpu_communicator.install()
    cpu_communicator.install()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    try:
        group = dist.new_group(list(range(num_members)), backend="gloo")
        if rank < num_members:
            yield CpuCommunicator(group, torch.device("cpu"), group, unique_name="dp:0")
        else:
            yield None  # type: ignore[misc]
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rows_of(rank: int, num_rows: int, dtype: torch.dtype, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(-50, 50, (num_rows, width), generator=generator).to(dtype)


Gathered = list[tuple[list[torch.Tensor], torch.Tensor]]


def gather(rank: int, _: int, store: dist.Store, num_members: int, cases: list[list[int]]) -> Gathered:
    results: Gathered = []
    with communicator(rank, store, num_members) as vllm:
        for sizes in cases if rank < num_members else []:
            given = [rows_of(rank, sizes[rank], *kind) for kind in GATHERED]
            several = vllm.all_gatherv(given, dim=0, sizes=sizes)
            one_strided = vllm.all_gatherv(given[0].t().contiguous().t(), dim=0, sizes=sizes)
            results.append((several, one_strided))
    return results


@pytest.mark.parametrize("cases", [[[3, 1], [1, 1], [0, 5], [0, 0]], [[3, 1, 4], [64, 64, 64], [0, 5, 2]]])
def test_rows_of_all_ranks_come_in_the_order_of_the_ranks(ranks: RankPool, cases: list[list[int]]) -> None:
    num_members = len(cases[0])
    for results in ranks.run(gather, num_members, cases)[:num_members]:
        assert len(results) == len(cases)
        for sizes, (several, one) in zip(cases, results, strict=True):
            for kind, gathered in zip(GATHERED, several, strict=True):
                wanted = torch.cat([rows_of(rank, sizes[rank], *kind) for rank in range(num_members)])
                assert gathered.dtype == kind[0]
                assert torch.equal(gathered, wanted)
            assert torch.equal(one, several[0])


def scatter(rank: int, _: int, store: dist.Store, sizes: list[int]) -> list[torch.Tensor]:
    with communicator(rank, store, len(sizes)) as vllm:
        if vllm is None:
            return []
        floats, narrow = summands(rank, sum(sizes))
        return [
            vllm.reduce_scatterv(floats, dim=0, sizes=sizes),
            vllm.reduce_scatterv(narrow, dim=0, sizes=sizes),
            vllm.reduce_scatterv(floats.t(), dim=-1, sizes=sizes).t().contiguous(),
        ]


def summands(rank: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rows_of(rank, num_rows, torch.float32, 4) / 7, rows_of(rank, num_rows, torch.bfloat16, 4) / 7


@pytest.mark.parametrize("sizes", [[2, 5], [3, 3], [0, 4], [1, 2, 3]])
def test_each_rank_gets_the_sums_of_its_own_rows(ranks: RankPool, sizes: list[int]) -> None:
    given = [summands(rank, sum(sizes)) for rank in range(len(sizes))]
    floats = torch.stack([each for each, _ in given]).sum(0).split(sizes)
    narrow = torch.stack([each.float() for _, each in given]).sum(0).bfloat16().split(sizes)
    results = ranks.run(scatter, sizes)
    for rank in range(len(sizes)):
        plain, rounded, along_columns = results[rank]
        torch.testing.assert_close(plain, floats[rank])
        assert torch.equal(rounded, narrow[rank])  # summed in float32 and rounded once
        assert torch.equal(along_columns, plain)


def misfit(rank: int, _: int, store: dist.Store) -> None:
    with communicator(rank, store, NUM_RANKS) as vllm:
        vllm.all_gatherv(torch.zeros(2, 3), sizes=[1, 1, 1])


def test_sizes_that_do_not_fit_are_named(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 0 of 3 gives \[2\] rows, sizes: \[1, 1, 1\]"):
        ranks.run(misfit)
