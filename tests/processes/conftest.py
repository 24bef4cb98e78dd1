"""What all tests with real processes need."""

from __future__ import annotations

import pytest

from tests.compiled_kernels import compile_kernels


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels() -> None:
    compile_kernels()
