"""TensorRT-LLM's expert statistics: the folder that EXPERT_STATISTIC_PATH names.

    meta_info.json             {"num_experts": E, "num_experts_per_token": K}
    rank0.safetensors, ...     for each EP rank: "<iteration>_<layer>" -> int64 or int32 [E], tokens it routed

The load of an iteration is the sum over the ranks. Layers are numbered as in the model, so they start
after its dense ones; iterations are neighbours, from the start of EXPERT_STATISTIC_ITER_RANGE up to its end.
Phases are not in it. Files of other names (co-occurrence, raw routing) are not read.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_platform.records import spool, strict_json
from eplb_platform.records.fault import Fault, RecordError, describe, file_size, shown
from eplb_platform.records.load_trace import NUM_PHASES, LoadTrace

META_INFO = "meta_info.json"
_MIXED = NUM_PHASES - 1
_RANK_FILE = re.compile(r"rank(\d{1,7})\.safetensors")
_KEY = re.compile(r"(\d{1,9})_(\d{1,9})")
_MAX_EXPERTS = 1 << 20


def read(path: str | os.PathLike[str]) -> LoadTrace:
    """The load of the folder at `path`, iteration by iteration, summed over its ranks.

    All steps are of the mixed phase. The metadata names first_iteration, first_moe_layer, ep_size and
    num_experts_per_token. Raises RecordError with the file and the place of what is wrong.
    """
    folder = Path(path)
    num_experts, experts_per_token = _meta_info(folder / META_INFO)
    files = _rank_files(folder)
    with ExitStack() as stack:
        ranks = [_Rank.open(file, num_experts, stack) for file in files]
        iterations, layers = _axes(folder, ranks)
        try:
            load = spool.zeros((len(iterations), len(layers), num_experts))
        except OSError as error:
            raise RecordError(path, Fault("", f"no room for the load: {describe(error)}")) from error
        for rank in ranks:
            rank.add_to(load, iterations[0], {layer: i for i, layer in enumerate(layers)})
    metadata = {
        "num_experts_per_token": str(experts_per_token),
        "ep_size": str(len(files)),
        "first_iteration": str(iterations[0]),
        "first_moe_layer": str(layers[0]),
    }
    return LoadTrace(load, np.full(len(iterations), _MIXED, dtype=np.uint8), metadata)


def write(
    path: str | os.PathLike[str],
    trace: LoadTrace,
    *,
    ep_size: int | None = None,
    num_experts_per_token: int | None = None,
) -> None:
    """Write the trace as a new folder at `path`; it appears when it is complete.

    ep_size, num_experts_per_token: by default what the trace's metadata say, at least 1. Which rank routed a
        token is not in a trace: the counts are shared evenly by the ranks' files.

    Phases are lost. Raises RecordError when there is a file or a folder at `path` already, for a trace
    without steps, and when the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        raise RecordError(path, Fault("", "there is something already, expected a new folder"))
    if not trace.num_steps:
        raise RecordError(path, Fault("", "a trace without steps, which this format cannot hold"))
    ranks = ep_size or int(number(trace, "ep_size", 1))
    meta = {
        "num_experts": trace.num_logical_experts,
        "num_experts_per_token": num_experts_per_token or number(trace, "num_experts_per_token", 1),
    }
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir(parents=True)
        (partial / META_INFO).write_text(json.dumps(meta))
        for rank in range(ranks):
            _write_rank(partial / f"rank{rank}.safetensors", trace, rank, ranks)
        partial.rename(target)
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def number(trace: LoadTrace, key: str, default: int) -> int:
    """The number that the trace's metadata have under `key`; `default` where they have none."""
    text = trace.metadata.get(key, "")
    return int(text) if re.fullmatch(r"\d{1,9}", text) else default


@dataclass(frozen=True)
class _Rank:
    """The file of one rank, open. keys: (iteration, layer) of each tensor, by its name"""

    path: Path
    file: Any
    keys: dict[str, tuple[int, int]]
    num_experts: int

    @classmethod
    def open(cls, path: Path, num_experts: int, stack: ExitStack) -> _Rank:
        from safetensors import SafetensorError, safe_open

        file_size(path)
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            names = list(file.keys())
        except OSError as error:
            raise RecordError(path, Fault("", describe(error))) from error
        except (SafetensorError, ValueError, TypeError) as error:
            raise RecordError(path, Fault("", f"no .safetensors file: {shown(str(error))}")) from error
        keys = {}
        for name in names:
            match = _KEY.fullmatch(name)
            if match is None:
                raise RecordError(path, Fault(shown(name), "expected tensors named <iteration>_<layer>"))
            keys[name] = (int(match[1]), int(match[2]))
        if len(set(keys.values())) != len(keys):
            raise RecordError(path, Fault("", "an iteration and layer stands more than once"))
        return cls(path, file, keys, num_experts)

    def add_to(self, load: NDArray[np.int64], first_iteration: int, row_of_layer: dict[int, int]) -> None:
        """Add the counts to load, [iterations, layers, experts]."""
        for name, (iteration, layer) in self.keys.items():
            load[iteration - first_iteration, row_of_layer[layer]] += self._counts(name)

    def _counts(self, name: str) -> NDArray[np.int64]:
        from safetensors import SafetensorError

        entry = self.file.get_slice(name)
        shape, dtype = entry.get_shape(), entry.get_dtype()
        if shape != [self.num_experts] or dtype not in ("I32", "I64"):
            message = f"{dtype} {shape}, expected I32 or I64 [{self.num_experts}]"
            raise RecordError(self.path, Fault(name, message))
        try:
            counts = np.asarray(self.file.get_tensor(name), dtype=np.int64)
        except (SafetensorError, ValueError) as error:
            raise RecordError(self.path, Fault(name, shown(str(error)))) from error
        wrong = np.flatnonzero((counts < 0) | (counts > 1 << 40))
        if wrong.size:
            expert = wrong[0]
            message = f"{counts[expert]}, expected a number of tokens"
            raise RecordError(self.path, Fault(f"{name}[{expert}]", message))
        return counts


def _meta_info(path: Path) -> tuple[int, int]:
    """num_experts and num_experts_per_token."""
    document = strict_json.read(path)
    if not isinstance(document, dict):
        raise RecordError(path, Fault("", f"{shown(document)}, expected an object"))
    counts = []
    for key in ("num_experts", "num_experts_per_token"):
        value = document.get(key)
        if type(value) is not int or not 0 < value <= _MAX_EXPERTS:
            given = shown(value) if key in document else "missing"
            raise RecordError(path, Fault(key, f"{given}, expected an integer of at least 1"))
        counts.append(value)
    return counts[0], counts[1]


def _rank_files(folder: Path) -> list[Path]:
    """The files of ranks 0, 1, ...; the names come from the folder, so they do not lead out of it."""
    try:
        names = [file.name for file in folder.iterdir()]
        found = {int(m[1]): folder / m[0] for m in map(_RANK_FILE.fullmatch, names) if m}
    except OSError as error:
        raise RecordError(folder, Fault("", describe(error))) from error
    if not found:
        raise RecordError(folder, Fault("", "no rank<number>.safetensors, expected one for each EP rank"))
    for rank in range(len(found)):
        if rank not in found:
            message = f"missing, expected those of ranks 0 to {max(found)}"
            raise RecordError(folder, Fault(f"rank{rank}.safetensors", message))
    return [found[rank] for rank in sorted(found)]


def _axes(folder: Path, ranks: list[_Rank]) -> tuple[list[int], list[int]]:
    """Iterations and layers, ascending; every layer is in every iteration, in the file of some rank."""
    keys = set().union(*(rank.keys.values() for rank in ranks))
    iterations = sorted({iteration for iteration, _ in keys})
    layers = sorted({layer for _, layer in keys})
    if not keys:
        raise RecordError(folder, Fault("", "no tensors in any file, expected iterations"))
    if iterations[-1] - iterations[0] + 1 != len(iterations):
        before, _ = next(pair for pair in pairwise(iterations) if pair[1] != pair[0] + 1)
        raise RecordError(folder, Fault("", f"iteration {before + 1} is missing, expected every one"))
    if len(keys) != len(iterations) * len(layers):
        iteration, layer = next((i, n) for i in iterations for n in layers if (i, n) not in keys)
        message = "missing in the files of all ranks, expected every layer in every iteration"
        raise RecordError(folder, Fault(f"{iteration}_{layer}", message))
    return iterations, layers


def _write_rank(path: Path, trace: LoadTrace, rank: int, num_ranks: int) -> None:
    """The share of one rank, step by step: the shares of all ranks add up to the counts."""
    first_iteration, first_layer = number(trace, "first_iteration", 0), number(trace, "first_moe_layer", 0)
    largest = max((int(step.max()) for step in _steps(trace)), default=0)
    name, dtype = ("I32", np.dtype("<i4")) if largest < 1 << 31 else ("I64", np.dtype("<i8"))
    nbytes = trace.num_logical_experts * dtype.itemsize
    header = {}
    for step in range(trace.num_steps):
        for layer in range(trace.num_layers):
            start = (step * trace.num_layers + layer) * nbytes
            header[f"{first_iteration + step}_{first_layer + layer}"] = {
                "dtype": name,
                "shape": [trace.num_logical_experts],
                "data_offsets": [start, start + nbytes],
            }
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for step_load in _steps(trace):
            file.write(((step_load + rank) // num_ranks).astype(dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _steps(trace: LoadTrace) -> Iterator[NDArray[np.int64]]:
    for step in range(trace.num_steps):
        yield trace.expert_load[step].astype(np.int64)
