"""Compiles the stub of CANN: the libraries that torch_npu asks for, with its symbols in them."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

LIBRARY = "libascendcl.so"
"""Holds everything."""

BESIDE_IT = (
    "libhccl.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
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
    for source in (*SOURCES, *HEADERS, Path(__file__)):
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
    lacking = sorted(needed(torch_npu) - _defined(objects))
    refusals = folder / "refusals.cpp"
    refusals.write_text(_refusals(lacking))
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


def needed(torch_npu: Path) -> set[str]:
    """Symbols that the wheel's libraries ask of others than torch, Python and the system."""
    of_the_wheel = [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so")]
    of_torch = list((Path(torch.__path__[0]) / "lib").glob("*.so"))
    defined = _defined([*of_the_wheel, *of_torch])
    asked = {symbol for symbol in _symbols("--undefined-only", of_the_wheel) if "@" not in symbol}
    system = ctypes.CDLL(None)
    return {symbol for symbol in asked - defined if not hasattr(system, symbol)}


def _refusals(symbols: Iterable[str]) -> str:
    """Each says its name and fails. The name is given to the assembler, as some of them are C++'s."""
    lines = ['extern "C" long cann_stub_refuse(const char *symbol);']
    lines.append("#pragma GCC visibility push(default)")
    for number, symbol in enumerate(symbols):
        lines.append(f'extern "C" long refused_{number}() __asm__("{symbol}");')
        lines.append(f'long refused_{number}() {{ return cann_stub_refuse("{symbol}"); }}')
    return "\n".join(lines) + "\n"


def _defined(files: Iterable[Path]) -> set[str]:
    return {symbol.partition("@")[0] for symbol in _symbols("--defined-only", files)}


def _symbols(kind: str, files: Iterable[Path]) -> set[str]:
    """Those that are defined, or those that are not and are not weak, with the version they ask for."""
    symbols = set()
    for file in files:
        dynamic = ["-D"] if file.suffix == ".so" else []
        done = subprocess.run(["nm", *dynamic, kind, file], capture_output=True, text=True, check=True)
        fields = [line.split() for line in done.stdout.splitlines()]
        symbols.update(parts[-1] for parts in fields if kind == "--defined-only" or parts[-2] == "U")
    return symbols


def _compile(source: Path, target: Path) -> None:
    flags = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-Wall", "-fvisibility=hidden"]
    here = f"-I{Path(__file__).parent}"
    _run(["g++", *flags, here, "-c", source, "-o", target])


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
