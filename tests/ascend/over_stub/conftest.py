"""The vendor's torch_npu, for real, over the stub of CANN that `tests/ascend/cann_stub/run.py` builds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from eplb_platform.testing.processes import RankPool
from tests.compiled_kernels import compile_kernels

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.processes)
            if "CANN_STUB" not in os.environ:
                reason = "runs over the stub of CANN: make ascend-tests, or tests/ascend/cann_stub/run.py"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels() -> None:
    compile_kernels()


# For one file: what its tests leave on a device should reach no other.
@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=600.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with RankPool(4, timeout_s=600.0) as pool:
        yield pool


@pytest.fixture
def lost_pair() -> Iterator[RankPool]:
    """For one test whose groups of HCCL fail: torch_npu's watchdog ends such a process, at any later time."""
    with RankPool(2, timeout_s=600.0) as pool:
        yield pool
