"""The Ascend backend keeps the contract on `npu` devices, in two processes and, what ranks say, in four."""

from __future__ import annotations

import pytest

from eplb_platform.testing.checks import CHECKS
from eplb_platform.testing.contract import run_check
from eplb_platform.testing.processes import RankPool


@pytest.mark.parametrize("clause", CHECKS)
def test_two_ranks_keep(pair: RankPool, clause: str) -> None:
    result = run_check(pair, "ascend", clause, device="npu")
    assert result.passed, result.detail


@pytest.mark.parametrize("clause", [name for name, check in CHECKS.items() if check.min_ranks > 1])
def test_four_ranks_keep(four: RankPool, clause: str) -> None:
    result = run_check(four, "ascend", clause, device="npu")
    assert result.passed, result.detail
