"""Commands on a trace that is larger than the memory they may take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "large_trace.py"
LARGEST_MB = {"report": 400, "advise": 800}
"""Less than what the command takes without a trace and the gigabyte that it goes through."""

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


def test_memory_does_not_grow_with_the_trace() -> None:
    chosen = [word for command in LARGEST_MB for word in ("--only", command)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--gigabytes", "1", *chosen],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks = dict(re.findall(r"^(\w+) .* (\d+) MB$", done.stdout, flags=re.MULTILINE))
    assert set(peaks) == set(LARGEST_MB)
    for command, megabytes in peaks.items():
        assert int(megabytes) < LARGEST_MB[command], done.stdout
