"""What the wheel's libraries ask of CANN is there, and what the stub cannot do fails with its name."""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path

import pytest

from eplb_backends.ascend import environment
from tests.ascend.cann_stub.symbols import census


@pytest.fixture
def torch_npu_folder() -> Path:
    return Path(str(environment.torch_npu().__file__)).parent


def test_every_symbol_that_the_wheel_asks_for_is_there(torch_npu_folder: Path) -> None:
    counted = census(Path(os.environ["CANN_STUB"]), torch_npu_folder)
    assert not counted.lacking
    assert {"aclrtMapMem", "_ZN2ge12AscendStringC1EPKc"} <= counted.refused
    assert {"aclrtMalloc", "aclrtRecordEvent"} <= counted.done
    assert {"HcclBatchSendRecv", "aclnnInplaceCopy"} <= counted.looked_for


def test_a_function_of_c_fails_with_its_name(torch_npu_folder: Path) -> None:
    library = ctypes.CDLL("libascendcl.so")
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert library.aclrtMapMem() != 0
    assert b"aclrtMapMem was called, which the stub does not have" in library.aclGetRecentErrMsg()


def test_one_of_c_plus_plus_does_too(torch_npu_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph engine, by the wheel's own library for it."""
    monkeypatch.syspath_prepend(str(torch_npu_folder / "dynamo" / "torchair" / "core"))
    graphs = importlib.import_module("_torchair")
    with pytest.raises(RuntimeError, match=r"AscendString.* was called, which the stub does not have"):
        graphs.InitializeGraphEngine({})
