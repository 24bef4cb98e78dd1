"""Compares the installed packages with the known vulnerabilities, through pip-audit.

python ci/audit.py     # exit code 1 for a vulnerability that was found, and only for that

pip-audit, and the service that it asks, are not part of what the tests need: where one of them cannot be
reached, one line says so and the exit code is 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENT = Path(".venv-audit")
INSTALL_TIMEOUT_S = 180.0
AUDIT_TIMEOUT_S = 300.0


class Unavailable(Exception):
    """Why nothing can be said."""


def main() -> int:
    try:
        found = vulnerabilities()
    except Unavailable as reason:
        print(f"SKIPPED audit: {reason}")
        return 0
    for line in found:
        print(line)
    print(f"audit: {len(found)} known vulnerabilities in the installed packages")
    return 1 if found else 0


def vulnerabilities() -> list[str]:
    """One line for each. Raises Unavailable."""
    auditor = installed_auditor()
    frozen = run([sys.executable, "-m", "pip", "list", "--format=freeze", "--exclude-editable"], 60.0)
    if frozen.returncode:
        raise Unavailable(f"pip cannot list the packages: {last_line(frozen.stderr)}")
    requirements = ENVIRONMENT / "installed.txt"
    requirements.write_text(public_versions(frozen.stdout), encoding="utf-8")
    command: list[str | Path] = [
        auditor,
        "--no-deps",
        "--disable-pip",
        "--progress-spinner=off",
        "--format=json",
        "-r",
        requirements,
    ]
    audited = run(command, AUDIT_TIMEOUT_S)
    try:
        packages = json.loads(audited.stdout)["dependencies"]
        skipped = [package["skip_reason"] for package in packages if "skip_reason" in package]
        if len(skipped) == len(packages):
            raise Unavailable(
                f"none of {len(packages)} packages could be looked up: {', '.join(skipped[:1])}"
            )
        if skipped:
            print(f"audit: {len(skipped)} of {len(packages)} packages could not be looked up")
        return [
            f"{package['name']} {package['version']}: {found['id']}, fixed in "
            f"{', '.join(found['fix_versions']) or 'no release'}"
            for package in packages
            for found in package.get("vulns", ())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"pip-audit gave no answer: {last_line(audited.stderr)}") from error


def installed_auditor() -> Path:
    """pip-audit in an environment of its own, made at the first call."""
    program = ENVIRONMENT / "bin" / "pip-audit"
    if not program.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        install: list[str | Path] = [
            ENVIRONMENT / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "pip-audit",
        ]
        done = run(install, INSTALL_TIMEOUT_S)
        if done.returncode or not program.exists():
            raise Unavailable(f"pip-audit cannot be installed: {last_line(done.stderr)}")
    return program


def public_versions(frozen: str) -> str:
    """Without local parts of versions (2.8.0+cpu), which no list of vulnerabilities knows."""
    return "".join(f"{line.partition('+')[0]}\n" for line in frozen.splitlines() if "==" in line)


def run(command: Sequence[str | Path], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Raises Unavailable for a command that does not start or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{Path(command[0]).name}: {error}") from error


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no word of why")[:300]


if __name__ == "__main__":
    sys.exit(main())
