"""The Ascend backend keeps the contract on `npu` devices, between two and four ranks, by either transport."""

from __future__ import annotations

import pytest

from eplb_platform.testing.checks import CHECKS
from eplb_platform.testing.contract import run_check
from eplb_platform.testing.processes import RankPool
from tests.ascend.over_stub.collective_ascend import CollectiveAscend

OF_RANKS = [name for name, check in CHECKS.items() if check.min_ranks > 1]
"""Clauses about what goes between ranks."""


@pytest.mark.parametrize("clause", CHECKS)
def test_two_ranks_keep(pair: RankPool, clause: str) -> None:
    result = run_check(pair, "ascend", clause, device="npu")
    assert result.passed, result.detail


@pytest.mark.parametrize("clause", OF_RANKS)
def test_four_ranks_keep(four: RankPool, clause: str) -> None:
    result = run_check(four, "ascend", clause, device="npu")
    assert result.passed, result.detail


@pytest.mark.parametrize("clause", OF_RANKS)
def test_two_ranks_keep_by_hccl(pair: RankPool, clause: str) -> None:
    result = run_check(pair, CollectiveAscend, clause, device="npu")
    assert result.passed, result.detail


@pytest.mark.parametrize("clause", OF_RANKS)
def test_four_ranks_keep_by_hccl(four: RankPool, clause: str) -> None:
    result = run_check(four, CollectiveAscend, clause, device="npu")
    assert result.passed, result.detail
