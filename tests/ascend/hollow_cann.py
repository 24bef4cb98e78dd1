"""Libraries with the names of CANN's in which every function returns 0, so that torch_npu can be imported.

Made from what the wheel's libraries ask for; nothing in them does anything. They say that there are two NPUs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

LIBRARY = "libascendcl.so"
BESIDE_IT = (
    "libhccl.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libge_runner.so",
    "libgraph.so",
)
"""Asked for by name, and empty."""

DEVICE_COUNT = "aclrtGetDeviceCount"


def build(folder: Path, torch_npu: Path) -> None:
    """Compile them into `folder`. Raises FileNotFoundError where there is no gcc or nm."""
    of_the_wheel = [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so")]
    of_torch = list((Path(torch.__path__[0]) / "lib").glob("*.so"))
    defined = {symbol.partition("@")[0] for symbol in _symbols("--defined-only", [*of_the_wheel, *of_torch])}
    asked = {symbol for symbol in _symbols("--undefined-only", of_the_wheel) if "@" not in symbol}
    needed = sorted(symbol for symbol in asked - defined if not symbol.startswith(("Py", "_Py")))
    source = folder / "hollow.c"
    source.write_text("\n".join(_definition(number, symbol) for number, symbol in enumerate(needed)) + "\n")
    _compile(folder / LIBRARY, str(source))
    for name in BESIDE_IT:
        _compile(folder / name, "-Wl,--no-as-needed", f"-L{folder}", "-lascendcl")


def _definition(number: int, symbol: str) -> str:
    """The name is given to the assembler, as some of them are C++'s."""
    parameters, body = ("void", "return 0;")
    if symbol == DEVICE_COUNT:
        parameters, body = "unsigned *count", "*count = 2; return 0;"
    name = f"hollow_{number}"
    return f'long {name}({parameters}) __asm__("{symbol}"); long {name}({parameters}) {{ {body} }}'


def _symbols(kind: str, libraries: Iterable[Path]) -> set[str]:
    """Strong and weak ones that are defined, or strong ones that are not, with the version they ask for."""
    symbols = set()
    for library in libraries:
        done = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True, check=True)
        fields = [line.split() for line in done.stdout.splitlines()]
        symbols.update(parts[-1] for parts in fields if kind == "--defined-only" or parts[-2] == "U")
    return symbols


def _compile(library: Path, *arguments: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(library), *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
