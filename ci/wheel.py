"""Builds the wheel, installs it where nothing else of the project is, and runs `eplb` from there.

What an editable install cannot show: that package data, entry points and both package roots are in the wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def copy_sources(target: Path) -> None:
    """Copy the files that git knows or would know, so that no stale build output gets into the wheel."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)


def build_wheel(sources: Path, target: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(target), str(sources)], check=True)
    return next(target.glob("eplb_platform-*.whl"))


def install_alone(wheel: Path, folder: Path) -> Path:
    """Install the wheel in an environment that borrows this one's dependencies; return its `bin` folder.

    A path file appends this environment's packages to the search path. Path files found there are not
    followed, so that the editable install of the project stays invisible.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--ignore-installed", str(wheel)], check=True)
    return folder / "bin"


def run(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"wheel: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def check_installed(binaries: Path, folder: Path) -> None:
    """Run what proves entry points and package data, and that it is the wheel that runs."""
    where = (
        "import eplb_platform, eplb_backends; print(eplb_platform.__file__, list(eplb_backends.__path__)[0])"
    )
    paths = run([str(binaries / "python"), "-c", where], folder)
    if any(not path.startswith(str(folder)) for path in paths.split()):
        raise SystemExit(f"wheel: the project was imported from elsewhere: {paths}")
    backends = json.loads(run([str(binaries / "eplb"), "backends", "--json"], folder))
    usable = {backend["name"] for backend in backends if backend["usable"]}
    if "cpu" not in usable:
        raise SystemExit(f"wheel: the cpu backend is not usable: {backends}")
    result = json.loads(run([str(binaries / "eplb"), "demo", "--ranks", "2", "--quick", "--json"], folder))
    print(f"wheel: backends {sorted(usable)}, demo tokens_identical={result['tokens_identical']}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="eplb-wheel-") as name:
        folder = Path(name).resolve()
        sources = folder / "sources"
        copy_sources(sources)
        wheel = build_wheel(sources, folder)
        check_installed(install_alone(wheel, folder / "environment"), folder)


if __name__ == "__main__":
    main()
