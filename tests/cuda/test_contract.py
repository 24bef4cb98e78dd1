"""The CUDA backend keeps the contract: alone, and in two processes, which share a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eplb_platform.testing.contract import clauses, run_check
from eplb_platform.testing.processes import RankPool


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    with RankPool(1, timeout_s=150.0) as alone, RankPool(2, timeout_s=150.0) as pair:
        yield {1: alone, 2: pair}


@pytest.mark.parametrize(
    ("num_ranks", "clause"), [(ranks, clause) for ranks in (1, 2) for clause in clauses(ranks)]
)
def test_the_cuda_backend_keeps(pools: dict[int, RankPool], num_ranks: int, clause: str) -> None:
    result = run_check(pools[num_ranks], "cuda", clause, device="cuda")
    assert result.passed, result.detail
