"""Torch is imported although one of its extensions for devices is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

SCRIPT = """
    import json, os, sys
    {before}
    from eplb_platform.device_extensions import import_torch
    import_torch()
    import torch
    print(json.dumps([torch.zeros(2).tolist(), os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"),
                      sys.modules.get("good") and sys.modules["good"].calls]))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two extensions: `bad`, which turns the switch off and fails, and then `good`."""
    (tmp_path / "good.py").write_text("calls = 0\ndef load():\n    global calls\n    calls += 1\n")
    (tmp_path / "bad.py").write_text(
        "import os\nos.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\nimport torch\n"
        "raise OSError('no\\ndriver')\n"
    )
    return tmp_path


def offer(site: Path, *names: str) -> None:
    information = site / "vendor-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor\nVersion: 1.0\n")
    lines = [f"{name} = {name}:load" for name in names]
    (information / "entry_points.txt").write_text("\n".join(["[torch.backends]", *lines, ""]))


def ask(site: Path, switch: str | None, before: str = "") -> tuple[list[object], str]:
    """[a tensor, the switch afterwards, how often `good` was loaded], and standard error."""
    variables = {**os.environ, "PYTHONPATH": str(site)}
    variables.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    if switch is not None:
        variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] = switch
    command = [sys.executable, "-c", dedent(SCRIPT).format(before=before)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(("switch", "error"), [(None, "OSError"), ("1", "BaseException")])
def test_a_broken_extension_leaves_torch_and_the_others(site: Path, switch: str | None, error: str) -> None:
    broken = site / "bad.py"
    broken.write_text(broken.read_text().replace("OSError", error))
    offer(site, "bad", "good")
    answer, errors = ask(site, switch)
    assert answer == [[0.0, 0.0], "0", 1]
    assert errors == f"torch extension bad is not loaded: {error}: no driver\n"


@pytest.mark.parametrize("switch", [None, "1"])
def test_good_extensions_are_loaded_once(site: Path, switch: str | None) -> None:
    offer(site, "good")
    assert ask(site, switch) == ([[0.0, 0.0], switch, 1], "")


def test_none_is_loaded_where_that_is_switched_off(site: Path) -> None:
    offer(site, "bad", "good")
    assert ask(site, "0") == ([[0.0, 0.0], "0", None], "")


def test_a_torch_that_is_there_is_left_alone(site: Path) -> None:
    offer(site, "good")
    assert ask(site, None, before="import torch") == ([[0.0, 0.0], None, 1], "")
