"""With the vendor's torch_npu installed and no CANN: one clear line, and every other backend works."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest

from tests.ascend.cann_stub.build import BESIDE_IT, LIBRARY

SCRIPT = """
    import json
    from dataclasses import asdict
    from eplb_platform import discover_backends
    reports = {report.name: asdict(report) for report in discover_backends()}
    import torch
    from eplb_platform import load_backend
    ids, table = torch.tensor([[0, 1]]), torch.tensor([[3], [5]])
    mapped = load_backend("cpu").map_and_record(ids, table, torch.ones(2, dtype=torch.int64), None)
    print(json.dumps({"reports": reports, "mapped": mapped.tolist()}))
"""


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_the_reason_is_said_and_the_cpu_backend_works(environment: Path, autoload: str) -> None:
    try:
        ctypes.CDLL("libhccl.so")
    except OSError:
        pass
    else:
        pytest.skip("CANN is here")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("ASCEND_")}
    variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] = autoload
    command = [str(environment / "bin" / "python"), "-c", dedent(SCRIPT)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    ascend, cpu = answer["reports"]["ascend"], answer["reports"]["cpu"]
    assert answer["mapped"] == [[3, 5]]
    assert cpu["usable"]
    assert not ascend["usable"]
    assert ascend["reason"].startswith("CANN cannot be loaded (OSError: libhccl.so")
    assert ascend["reason"].endswith("install CANN and source its set_env.sh")
    assert ascend["versions"]["torch_npu"] == "2.13.0"
    if autoload == "1":
        (line,) = done.stderr.splitlines()
        assert line.startswith("torch extension torch_npu is not loaded: ImportError: libhccl.so")
    else:
        assert done.stderr == ""


SYMBOLLESS = """
    from eplb_platform import discover_backends
    print(next(report.reason for report in discover_backends() if report.name == "ascend"))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_a_cann_that_lacks_a_symbol_is_said_with_it(environment: Path, tmp_path: Path) -> None:
    """As one that is older than torch_npu: the libraries are there, and a function is not."""
    for name in (LIBRARY, *BESIDE_IT):
        empty = ["gcc", "-shared", "-x", "c", "-", "-o", str(tmp_path / name)]
        subprocess.run(empty, input="int nothing;", text=True, check=True)
    variables = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "ASCEND_HOME_PATH": str(tmp_path)}
    command = [str(environment / "bin" / "python"), "-c", dedent(SYMBOLLESS)]
    done = subprocess.run(
        command,
        env=variables | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("torch_npu 2.13.0 fails to import: ImportError: ")
    assert "undefined symbol: " in line
    assert line.endswith("lacks it, install the one that torch_npu 2.13.0 was made for")
