"""The Ascend backend keeps the contract on `npu` devices, between two and four ranks, by either transport."""

from __future__ import annotations

import gc

import pytest
from torch.distributed import Store

from eplb_platform.backend import Backend
from eplb_platform.testing.checks import CHECKS
from eplb_platform.testing.contract import run_check
from eplb_platform.testing.processes import RankPool
from tests.ascend.over_stub.collective_ascend import CollectiveAscend

OF_RANKS = [name for name, check in CHECKS.items() if check.min_ranks > 1]
"""Clauses about what goes between ranks."""


def check_clause(pool: RankPool, backend: str | type[Backend], clause: str) -> None:
    result = run_check(pool, backend, clause, device="npu")
    assert result.passed, result.detail
    pool.run(free_groups)


def free_groups(rank: int, num_ranks: int, store: Store) -> None:
    """The end of an aborted group of HCCL waits for its threads: not in the middle of the next clause."""
    gc.collect()


@pytest.mark.parametrize("clause", CHECKS)
def test_two_ranks_keep(pair: RankPool, clause: str) -> None:
    check_clause(pair, "ascend", clause)


@pytest.mark.parametrize("clause", OF_RANKS)
def test_four_ranks_keep(four: RankPool, clause: str) -> None:
    check_clause(four, "ascend", clause)


@pytest.mark.parametrize("clause", OF_RANKS)
def test_two_ranks_keep_by_hccl(pair: RankPool, clause: str) -> None:
    check_clause(pair, CollectiveAscend, clause)


@pytest.mark.parametrize("clause", OF_RANKS)
def test_four_ranks_keep_by_hccl(four: RankPool, clause: str) -> None:
    check_clause(four, CollectiveAscend, clause)
