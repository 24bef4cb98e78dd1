"""Other engines' own EPLB modules, as `ci/engine_packages.py` unpacks them; without them tests are skipped.

What they import besides is replaced by stand-ins, in this process and only while the tests of a file run:
see `sglang_engine.py` and `vllm_ascend_engine.py` for what is real and what is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.sglang_engine import SglangEngine
from tests.engines.stand_ins import imported_from
from tests.engines.vllm_ascend_engine import VllmAscendEngine

FOLDER = Path(os.environ.get("EPLB_ENGINES", Path(__file__).resolve().parents[2] / ".engines"))


def _folder(*names: str) -> Path:
    for name in names:
        unavailable = FOLDER / f"{name}.unavailable"
        if unavailable.exists():
            pytest.skip(unavailable.read_text().strip())
        if not (FOLDER / name.replace("-", "_")).is_dir():
            pytest.skip(f"{name} is not there: python ci/engine_packages.py")
    return FOLDER


@pytest.fixture(scope="module")
def sglang() -> Iterator[SglangEngine]:
    with imported_from(_folder("sglang", "einops"), ("sglang", "einops")) as provide:
        yield SglangEngine(provide)


@pytest.fixture(scope="module")
def vllm_ascend() -> Iterator[VllmAscendEngine]:
    names = ("vllm_ascend", "vllm", "torch_npu")
    with imported_from(_folder("vllm-ascend"), names) as provide:
        yield VllmAscendEngine(provide)
