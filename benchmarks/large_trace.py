"""Time and peak memory of commands on a trace that is larger than memory should be.

    python benchmarks/large_trace.py [--gigabytes 1]

The trace has 58 layers x 256 experts and its full size, but most of it lies in holes of a sparse file: every
tenth step has tokens, the others are idle. Every byte is read by each command all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from eplb_platform.records import load_trace

LAYERS, EXPERTS, SERVED_EVERY = 58, 256, 10
COMMANDS = {
    "report": ("--ep-size", "32"),
    "plan": ("--ep-size", "32", "--num-slots", "288", "-o", "map.json"),
    "advise": ("--ep-size", "32", "--memory", "24"),
    "simulate": ("--ep-size", "32", "--redundant-experts", "32"),
    "validate": (),
}


def write_sparse(path: Path, steps: int) -> None:
    """A trace of so many steps, all zero, into which the steps with tokens are then written."""
    load_bytes = steps * LAYERS * EXPERTS * 4
    header = {
        "__metadata__": {"format_version": load_trace.FORMAT_VERSION},
        "expert_load": {"dtype": "I32", "shape": [steps, LAYERS, EXPERTS], "data_offsets": [0, load_bytes]},
        "phase": {"dtype": "U8", "shape": [steps], "data_offsets": [load_bytes, load_bytes + steps]},
    }
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    start = 8 + len(text)
    rng = np.random.default_rng(0)
    shares = rng.lognormal(size=(LAYERS, EXPERTS))
    shares /= shares.sum(axis=1, keepdims=True)
    step = rng.multinomial(4096 * 8, shares).astype("<i4").tobytes()
    # Not through a mapping: a process's peak memory counts that of the one it was started by.
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for served in range(0, steps, SERVED_EVERY):
            file.seek(start + served * len(step))
            file.write(step)
        file.seek(start + load_bytes)
        file.write(bytes([1]) * steps)


def measured(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Seconds, those of the processor, and peak megabytes of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    spent = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - started, spent, usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--only", choices=COMMANDS, action="append")
    options = parser.parse_args()
    steps = int(options.gigabytes * 1e9 / (LAYERS * EXPERTS * 4))
    program = "from eplb_platform.cli import main; main()"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "trace.safetensors"
        write_sparse(path, steps)
        print(f"{path.stat().st_size / 1e9:.1f} GB, {steps} steps")
        for command in options.only or COMMANDS:
            seconds, spent, megabytes = measured(
                [sys.executable, "-c", program, command, str(path), *COMMANDS[command]], Path(name)
            )
            print(
                f"{command:<9} {seconds:7.1f} s, {spent:6.1f} s of processor {megabytes:6.0f} MB", flush=True
            )


if __name__ == "__main__":
    main()
