"""Compiles the stub of CANN: the libraries that torch_npu asks for, with its symbols in them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from tests.ascend.cann_stub import symbols

LIBRARY = "libascendcl.so"
"""Holds everything."""

BESIDE_IT = (
    "libhccl.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libascend_protobuf.so",
    "libatb.so",
    "libfmk_parser.so",
    "libge_runner.so",
    "libgraph.so",
    "libhcomm.so",
    "libopapi.so",
)
"""Asked for by name; they lead to it."""

PARTS_OF_CANN = ("compiler", "opp", "runtime")
"""Folders of an installation that torch_npu looks for when it is imported."""

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
TOOLS = ("g++", "nm")


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def built(folder: Path, torch_npu: Path) -> Path:
    """The libraries' folder inside `folder`, compiled where these sources were not compiled before."""
    digest = hashlib.sha256((torch_npu / "version.py").read_bytes() + torch.__version__.encode())
    for source in (*SOURCES, *HEADERS, Path(__file__), Path(symbols.__file__)):
        digest.update(source.read_bytes())
    finished = folder / digest.hexdigest()[:16]
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder))
        build(unfinished, torch_npu)
        with suppress(OSError):  # another process was faster
            unfinished.rename(finished)
        shutil.rmtree(unfinished, ignore_errors=True)
    return finished


def build(folder: Path, torch_npu: Path) -> None:
    """Compile the libraries into `folder`. Raises CalledProcessError, with the compiler's words."""
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(_compile, SOURCES, objects))
    lacking = sorted(symbols.asked_for(torch_npu) - symbols.defined_by(objects))
    refusals = folder / "refusals.cpp"
    refusals.write_text(symbols.refusals(lacking))
    _compile(refusals, folder / "refusals.o")
    _run(["g++", "-shared", "-pthread", "-o", folder / LIBRARY, *objects, folder / "refusals.o", "-ldl"])
    for name in BESIDE_IT:
        search = [f"-L{folder}", "-lascendcl", "-Wl,-rpath,$ORIGIN"]
        _run(["g++", "-shared", "-Wl,--no-as-needed", "-o", folder / name, *search])
    for name in PARTS_OF_CANN:
        (folder / name).mkdir()
    _announce(folder)


def _announce(folder: Path) -> None:
    """Let torch register the operators when it is imported with this folder on its path."""
    announcement = folder / "cann_stub-1.dist-info"
    announcement.mkdir()
    (announcement / "METADATA").write_text("Metadata-Version: 2.1\nName: cann_stub\nVersion: 1\n")
    operators = "cann_stub = tests.ascend.cann_stub.host_operators:register"
    (announcement / "entry_points.txt").write_text(f"[torch.backends]\n{operators}\n")


def _compile(source: Path, target: Path) -> None:
    flags = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-Wall", "-fvisibility=hidden"]
    here = f"-I{Path(__file__).parent}"
    _run(["g++", *flags, here, "-c", source, "-o", target])


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
