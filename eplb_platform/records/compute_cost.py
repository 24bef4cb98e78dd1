"""Compute cost: the time that one token takes in each expert, in any unit.

.json          [[...], ...], a row for each layer, null for an expert that was not profiled
.npy           a number array [layers, logical], NaN for an expert that was not profiled
.safetensors   the same as tensor `compute_cost`
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_platform.records import strict_json
from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, RecordError, describe, file_size, shown

TENSOR = "compute_cost"
SUFFIXES = (".json", ".npy", ".safetensors")
MAX_FILE_BYTES = 1 << 28
# Whatever the unit: products and quotients of such times stay numbers.
_LEAST, _MOST = 1e-100, 1e100


def read(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    """[layers, logical], the cost of one token, NaN where there is none. Raises RecordError."""
    size = file_size(path)
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(path, Fault("", f"suffix {suffix!r}, expected one of {', '.join(SUFFIXES)}"))
    if size > MAX_FILE_BYTES:
        raise RecordError(path, Fault("", f"{size} bytes, expected at most {MAX_FILE_BYTES}"))
    try:
        cost = _from_json(path) if suffix == ".json" else _from_array(path, suffix)
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error
    _check(path, cost)
    return cost


def write(path: str | os.PathLike[str], cost: ArrayLike) -> None:
    """Write the cost, [layers, logical] with NaN where there is none, to `path`, atomically.

    Folders that are missing are made. Raises RecordError for another suffix, for what `read` would refuse,
    and when the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(path, Fault("", f"suffix {suffix!r}, expected one of {', '.join(SUFFIXES)}"))
    array = np.ascontiguousarray(cost, dtype=np.float64)
    _check(path, array)
    write_record(path, _content(array, suffix))


def _content(cost: NDArray[np.float64], suffix: str) -> bytes:
    if suffix == ".json":
        rows = [[None if np.isnan(value) else value for value in row] for row in cost.tolist()]
        return f"{json.dumps(rows)}\n".encode()
    if suffix == ".npy":
        file = io.BytesIO()
        np.save(file, cost, allow_pickle=False)
        return file.getvalue()
    from safetensors.numpy import save

    return bytes(save({TENSOR: cost}))


def _check(path: str | os.PathLike[str], cost: NDArray[np.float64]) -> None:
    if cost.ndim != 2 or 0 in cost.shape:
        raise RecordError(path, Fault("", f"shape {list(cost.shape)}, expected [layers, experts]"))
    wrong = np.argwhere(~(np.isnan(cost) | (cost == 0) | ((cost >= _LEAST) & (cost <= _MOST))))
    if len(wrong):
        layer, expert = wrong[0]
        message = f"{cost[layer, expert]:g}, expected a time: 0, or from {_LEAST:g} to {_MOST:g}"
        raise RecordError(path, Fault(f"[{layer}][{expert}]", message))


def _from_json(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    rows = strict_json.parse(path, Path(path).read_bytes())
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise RecordError(path, Fault("", f"{shown(rows)}, expected a list of times for each layer"))
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise RecordError(path, Fault(f"[{layer}]", f"{len(row)} experts, expected {len(rows[0])}"))
        for expert, value in enumerate(row):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise RecordError(
                    path, Fault(f"[{layer}][{expert}]", f"{shown(value)}, expected a number or null")
                )
    try:
        return np.array(rows, dtype=np.float64)
    except OverflowError as error:
        raise RecordError(path, Fault("", "a number has too many digits, expected times")) from error


def _from_array(path: str | os.PathLike[str], suffix: str) -> NDArray[np.float64]:
    from safetensors import safe_open

    try:
        if suffix == ".npy":
            # Mapped, so that a header that claims more than the file holds is refused before memory is taken.
            array = np.load(path, allow_pickle=False, mmap_mode="r")
        else:
            with safe_open(path, framework="numpy") as file:
                if TENSOR not in file.keys():  # noqa: SIM118 - the file is no mapping
                    raise RecordError(path, Fault(TENSOR, f"missing, there are {shown(list(file.keys()))}"))
                array = file.get_tensor(TENSOR)
    except RecordError:
        raise
    except Exception as error:  # a broken header raises whatever its parser runs into
        raise RecordError(path, Fault("", f"no {suffix} file: {shown(str(error))}")) from error
    if array.dtype.kind not in "iuf":
        raise RecordError(path, Fault("", f"dtype {array.dtype}, expected integers or floats"))
    return np.asarray(array, dtype=np.float64)
