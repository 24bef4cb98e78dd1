"""Tests that need a GPU; elsewhere they are skipped, with the reason that `eplb backends` gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from eplb_backends.cuda import CudaBackend

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = CudaBackend.availability()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not found.usable:
                item.add_marker(pytest.mark.skip(reason=f"no GPU: {found.reason}"))
