"""The vendor's torch_npu, as `ci/ascend_environment.py` installs it; without it these tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.ascend.wheel import Wheel

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-ascend"


@pytest.fixture(scope="session")
def environment() -> Path:
    found = Path(os.environ.get("EPLB_ASCEND_ENVIRONMENT", ENVIRONMENT))
    unavailable = found / ".unavailable"
    if unavailable.exists():
        pytest.skip(unavailable.read_text().strip())
    if not (found / ".installed").exists():
        pytest.skip("torch_npu is not set up: python ci/ascend_environment.py")
    return found


@pytest.fixture(scope="session")
def wheel(environment: Path) -> Wheel:
    (packages,) = environment.glob("lib/python3*/site-packages")
    return Wheel(packages)
