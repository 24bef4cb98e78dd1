"""Runs Python with the vendor's torch_npu over the stub of CANN.

python tests/ascend/cann_stub/run.py -m pytest -q tests/ascend/over_stub
python tests/ascend/cann_stub/run.py -m eplb_platform.cli demo --backend ascend --ranks 2 --quick

Builds the stub where it is not built yet, in the environment that `ci/ascend_environment.py` has made. Where
there is none, or no compiler, this says so and ends with 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.ascend.cann_stub import build  # noqa: E402


class Unavailable(Exception):
    """The stub cannot be had here; the text says why."""


def environment() -> Path:
    """The one with torch_npu. Raises `Unavailable`."""
    found = Path(os.environ.get("EPLB_ASCEND_ENVIRONMENT", ROOT / ".venv-ascend")).absolute()
    unavailable = found / ".unavailable"
    if unavailable.exists():
        raise Unavailable(unavailable.read_text().strip())
    if not (found / ".installed").exists():
        raise Unavailable("torch_npu is not set up: python ci/ascend_environment.py")
    return found


def variables(python: Path, shared: str) -> dict[str, str]:
    """What a process needs to run over the stub. Builds it. Raises `Unavailable` and CalledProcessError."""
    if missing := build.missing_tools():
        raise Unavailable(f"no {' and no '.join(missing)} to make the stub of CANN with")
    (torch_npu,) = python.glob("lib/python3*/site-packages/torch_npu")
    folder = build.built(python / "cann-stub", torch_npu)
    paths = [str(folder), str(ROOT), str(ROOT / "backends"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "PYTHONPATH": os.pathsep.join(paths),
        "ASCEND_HOME_PATH": str(folder),
        "ASCEND_OPP_PATH": str(folder / "opp"),
        "CANN_STUB_SHARED": shared,
        "CANN_STUB": str(folder),
        "CANN_STUB_RECORD": shared,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }


def main() -> int:
    try:
        python = environment()
        with tempfile.TemporaryDirectory(prefix="cann-stub-") as shared:
            command = [str(python / "bin" / "python"), *sys.argv[1:]]
            return os.spawnve(os.P_WAIT, command[0], command, {**os.environ, **variables(python, shared)})
    except subprocess.CalledProcessError as failed:
        print(f"the stub of CANN cannot be built: {failed}\n{failed.stderr}", file=sys.stderr)
        return 1
    except Unavailable as reason:
        print(f"SKIPPED {' '.join(sys.argv[1:])} over the stub of CANN: {reason}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
