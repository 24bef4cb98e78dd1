"""Compiled kernels on disk: kept while nothing changes, made again when what they call does."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from pathlib import Path

KERNEL = """
from eplb_platform.jit import kernel
{imports}

@kernel
def {name}(x: int) -> int:
    return {returns}
"""
RUN = "from outer import outer; print(outer(1), sum(outer.stats.cache_hits.values()))"


def _write(path: Path, imports: str, returns: str) -> None:
    path.write_text(KERNEL.format(imports=imports, name=path.stem, returns=returns))


def _result_and_cache_hits(folder: Path) -> list[int]:
    environment = {
        **os.environ,
        "NUMBA_DISABLE_JIT": "0",
        "NUMBA_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    output = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in output.stdout.split()]


def test_a_kernel_is_compiled_again_when_one_that_it_calls_in_another_file_changes(tmp_path: Path) -> None:
    _write(tmp_path / "outer.py", "from middle import middle", "middle(x)")
    _write(tmp_path / "middle.py", "from inner import inner", "inner(x)")
    _write(tmp_path / "inner.py", "", "x + 10")
    assert _result_and_cache_hits(tmp_path) == [11, 0]
    assert _result_and_cache_hits(tmp_path) == [11, 1]
    _write(tmp_path / "inner.py", "", "x + 20")
    assert _result_and_cache_hits(tmp_path) == [21, 0]


def test_a_kernel_without_the_source_of_one_that_it_calls_is_compiled_each_time(tmp_path: Path) -> None:
    _write(tmp_path / "outer.py", "from inner import inner", "inner(x)")
    _write(tmp_path / "inner.py", "", "x + 10")
    py_compile.compile(str(tmp_path / "inner.py"), cfile=str(tmp_path / "inner.pyc"), doraise=True)
    (tmp_path / "inner.py").unlink()
    for _ in range(2):
        assert _result_and_cache_hits(tmp_path) == [11, 0]
