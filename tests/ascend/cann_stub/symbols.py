"""Which symbols the wheel's libraries ask of CANN, and what the stub says for those that it does not have.

python tests/ascend/cann_stub/run.py tests/ascend/cann_stub/symbols.py    # counts them
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Census:
    """Names, by what the stub has for them."""

    done: frozenset[str]
    """Asked for when the wheel's libraries are loaded, and there."""
    refused: frozenset[str]
    """Asked for then; they fail with their name when they are called."""
    looked_for: frozenset[str]
    """There, for when torch_npu looks for them by name."""
    lacking: frozenset[str]
    """Asked for, and not there: the libraries do not load."""

    def __str__(self) -> str:
        asked = len(self.done) + len(self.refused)
        return (
            f"{asked + len(self.looked_for)} symbols: {asked} that the wheel's libraries ask for when they "
            f"are loaded, of which {len(self.refused)} are refused by name when they are called, and "
            f"{len(self.looked_for)} that torch_npu looks for by name"
        )


def census(stub: Path, torch_npu: Path) -> Census:
    """Of the stub that was built into the folder `stub`."""
    there, refused = defined_by([stub / "libascendcl.so"]), defined_by([stub / "refusals.o"])
    asked = asked_for(torch_npu)
    others = {name for name in there - asked if not name.startswith(("_Z", "cann_stub"))}
    return Census(
        frozenset(asked & there - refused),
        frozenset(asked & refused),
        frozenset(others),
        frozenset(asked - there),
    )


def asked_for(torch_npu: Path) -> set[str]:
    """Symbols that the wheel's libraries ask of others than torch, Python and the system."""
    of_the_wheel = list(torch_npu.rglob("*.so"))
    of_torch = list((Path(torch.__path__[0]) / "lib").glob("*.so"))
    defined = defined_by([*of_the_wheel, *of_torch])
    asked = {symbol for symbol in _listed("--undefined-only", of_the_wheel) if "@" not in symbol}
    system = ctypes.CDLL(None)
    return {symbol for symbol in asked - defined if not hasattr(system, symbol)}


def refusals(names: Iterable[str]) -> str:
    """Each says its name and fails: by its result, and C++'s, which may have none, by an exception.

    The name is given to the assembler, as C++'s are no names to the compiler.
    """
    lines = [f'extern "C" long {how}(const char *symbol);' for how in ("cann_stub_refuse", "cann_stub_throw")]
    lines.append("#pragma GCC visibility push(default)")
    for number, symbol in enumerate(names):
        how = "cann_stub_throw" if symbol.startswith("_Z") else "cann_stub_refuse"
        lines.append(f'extern "C" long refused_{number}() __asm__("{symbol}");')
        lines.append(f'long refused_{number}() {{ return {how}("{symbol}"); }}')
    return "\n".join(lines) + "\n"


def defined_by(files: Iterable[Path]) -> set[str]:
    return {symbol.partition("@")[0] for symbol in _listed("--defined-only", files)}


def _listed(kind: str, files: Iterable[Path]) -> set[str]:
    """Those that are defined, or those that are not and are not weak, with the version they ask for."""
    found = set()
    for file in files:
        dynamic = ["-D"] if file.suffix == ".so" else []
        done = subprocess.run(["nm", *dynamic, kind, file], capture_output=True, text=True, check=True)
        fields = [line.split() for line in done.stdout.splitlines()]
        found.update(parts[-1] for parts in fields if kind == "--defined-only" or parts[-2] == "U")
    return found


if __name__ == "__main__":
    import torch_npu

    print(census(Path(os.environ["CANN_STUB"]), Path(torch_npu.__file__).parent))
