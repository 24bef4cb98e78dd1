"""The worked example of docs/write_a_backend.md, built and installed as a distribution of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from eplb_platform.testing.contract import clauses

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "backend"
PAGE = (REPOSITORY / "docs" / "write_a_backend.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Environment:
    """An environment that sees this one's packages, the project from its sources, and the example."""

    python: Path
    packages: Path

    def run(self, *arguments: str, folder: Path, timeout_s: float = 600.0) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def loaded(self, folder: Path, *calls: str) -> list[str]:
        """For each call of `load_backend` the class that it gives, or its error."""
        script = f"""
from eplb_platform import load_backend
for call in {calls}:
    try:
        print(type(eval(call)).__name__)
    except Exception as error:
        print(error)
"""
        return self.run("-c", script, folder=folder).splitlines()

    def reports(self, folder: Path) -> dict[str, dict[str, object]]:
        command = "from eplb_platform.cli import main; main()"
        reports = json.loads(self.run("-c", command, "backends", "--json", folder=folder))
        return {report["name"]: report for report in reports}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("third_party")
    sources, wheels, home = folder / "sources", folder / "wheels", folder / "environment"
    shutil.copytree(EXAMPLE, sources, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    _pip("wheel", "--no-build-isolation", "--wheel-dir", str(wheels), str(sources))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    scheme = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    paths = [sysconfig.get_path("purelib"), str(REPOSITORY), str(REPOSITORY / "backends")]
    (packages / "project.pth").write_text("\n".join([*paths, ""]))
    python = home / "bin" / "python"
    [wheel] = wheels.glob("*.whl")
    _pip("install", "--no-index", str(wheel), python=python)
    return Environment(python, packages)


def _pip(command: str, *arguments: str, python: Path | None = None) -> None:
    where = [] if python is None else ["--python", str(python)]
    pip = [sys.executable, "-m", "pip", *where, command, "--quiet", "--no-deps", *arguments]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)


def test_the_page_shows_the_files_of_the_example() -> None:
    blocks = re.findall(r"```(?:toml|python)\n(.*?)```", PAGE, flags=re.DOTALL)
    for name in ("pyproject.toml", "thread_device.py"):
        assert (EXAMPLE / name).read_text(encoding="utf-8") in blocks


def test_it_is_found_beside_the_projects_own(environment: Environment, tmp_path: Path) -> None:
    reports = environment.reports(tmp_path)
    assert {"cpu", "thread"} <= reports.keys()
    assert reports["thread"]["usable"] is True
    assert set(reports["thread"]) == {"name", "device_type", "collective", "usable", "reason", "versions"}
    assert (environment.packages / "thread_device.py").exists()


def test_it_is_preferred_when_it_is_asked_for_by_name(environment: Environment, tmp_path: Path) -> None:
    calls = (
        'load_backend("thread")',
        'load_backend("thread", pinned_bytes=4096)',
        'load_backend("cpu")',
        "load_backend()",
    )
    assert environment.loaded(tmp_path, *calls) == [
        "ThreadBackend",
        "ThreadBackend",
        "CpuBackend",
        "2 backends are for cpu: name one of cpu, thread",
    ]


def test_it_keeps_the_contract(environment: Environment, tmp_path: Path) -> None:
    (script,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
        if "run_contract" in block
    ]
    (tmp_path / "contract.py").write_text(script)
    lines = environment.run("contract.py", folder=tmp_path).splitlines()
    kept = [line.split()[0] for line in lines if line.split()[1:2] == ["True"]]
    assert kept == clauses(2), "\n".join(lines)


def test_another_version_of_the_contract_is_refused_in_one_line(
    environment: Environment, tmp_path: Path
) -> None:
    module = environment.packages / "thread_device.py"
    source = module.read_text(encoding="utf-8")
    try:
        module.write_text(source.replace("contract_version: ClassVar[int] = 1", "contract_version = 2"))
        reports = environment.reports(tmp_path)
        assert reports["cpu"]["usable"] is True
        assert reports["thread"]["usable"] is False
        assert reports["thread"]["reason"] == (
            "thread_device:ThreadBackend is written for version 2 of the contract, not 1"
        )
        assert environment.loaded(tmp_path, "load_backend()", 'load_backend("thread")') == [
            "CpuBackend",
            f"backend 'thread' cannot be used: {reports['thread']['reason']}",
        ]
    finally:
        module.write_text(source)
