"""Sets up the virtual environment with the vendor's torch_npu that the Ascend backend is checked against.

python ci/ascend_environment.py                          # .venv-ascend
python ci/ascend_environment.py --environment FOLDER

It holds torch_npu and nothing else; all other packages are those of the environment that runs this. There,
torch_npu would make `import torch` fail, as CANN is missing. Where no wheel of it can be had, this says so,
leaves the reason in `FOLDER/.unavailable` and ends with 0; every other failure is an error. Nothing is
fetched when the environment is what the files ask for.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPOSITORY / "ci" / "requirements-ascend.txt"
PLATFORMS = {("Linux", "x86_64"), ("Linux", "aarch64")}
UNAVAILABLE, INSTALLED = ".unavailable", ".installed"


class NoWheel(Exception):
    """There is no torch_npu to check against here; the text says why."""


def fingerprint() -> str:
    """Changes when the environment has to be set up again."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + Path(__file__).read_bytes())
    return f"{digest.hexdigest()} {sys.version.split()[0]} {sys.prefix}\n"


def install(environment: Path) -> None:
    """Raises NoWheel when pip knows no such distribution for this interpreter and platform."""
    if (platform.system(), platform.machine()) not in PLATFORMS:
        raise NoWheel(f"no wheel of torch_npu for {platform.system()} {platform.machine()}")
    python = str(environment / "bin" / "python")
    arguments = ["--python", python, "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", *arguments, "--requirement", str(REQUIREMENTS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode and re.search(r"No matching distribution found for torch_npu\b", done.stdout):
        raise NoWheel(f"pip finds no wheel of torch_npu for Python {platform.python_version()}")
    if done.returncode:
        raise SystemExit(f"ascend: pip install ended with {done.returncode}:\n{done.stdout}")


def share_packages(environment: Path) -> None:
    """Let the environment see what is installed beside this interpreter, editable projects too."""
    (packages,) = environment.glob("lib/python3*/site-packages")
    shared = sysconfig.get_path("purelib")
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")


def set_up(environment: Path) -> None:
    """Bring `environment` to what the files ask for. Raises NoWheel, and SystemExit when pip fails."""
    installed = environment / INSTALLED
    if installed.exists() and installed.read_text() == fingerprint():
        return
    installed.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(environment)], check=True)
    install(environment)
    share_packages(environment)
    installed.write_text(fingerprint())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--environment", type=Path, default=REPOSITORY / ".venv-ascend")
    environment: Path = parser.parse_args().environment.absolute()
    unavailable = environment / UNAVAILABLE
    unavailable.unlink(missing_ok=True)
    try:
        set_up(environment)
    except NoWheel as reason:
        environment.mkdir(exist_ok=True)
        unavailable.write_text(f"{reason}\n")
        print(f"ascend: torch_npu is not installed, the tests with it are skipped: {reason}")


if __name__ == "__main__":
    main()
