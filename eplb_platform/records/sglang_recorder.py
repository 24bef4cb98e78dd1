"""Dumps of SGLang's expert distribution recorder, as .pt or .json, or a folder of .pt files.

stat, stat_approx    {"rank": 0, "logical_count": int [steps, layers, logical],
                      "average_utilization_rate_over_window": float or None}; one file for each dump
per_pass, per_token  {"records": [{"forward_pass_id", "rank", "global_physical_count": int [layers, physical],
                      ...}], "last_physical_to_logical_map": int [layers, physical]}; one file for each rank

A `logical_count` of [layers, logical] is one step: `--init-expert-location` takes either. Layers are all
hidden layers of the model: leading ones without any token are its dense layers and are left out. Steps
without any token are places of the recorder's buffer that were never filled, and are left out too. Phases are
not in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from eplb_platform.records import spool, strict_json, torch_file
from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, RecordError, describe, shown
from eplb_platform.records.load_trace import NUM_PHASES, LoadTrace

COUNT = "logical_count"
SUFFIXES = (".json", ".pt")
_MIXED = NUM_PHASES - 1
_MAX_AXIS = 1 << 20
_CHUNK_BYTES = 1 << 24


def read(path: str | os.PathLike[str]) -> LoadTrace:
    """The load in the dump at `path`, or in all .pt files of the folder there, by the time in their names.

    All steps are of the mixed phase; the metadata name first_moe_layer. Raises RecordError with the file and
    the place of what is wrong.
    """
    files = _files(Path(path))
    documents = [(file, _document(file)) for file in files]
    load: NDArray[np.integer]
    with_records = [file for file, document in documents if "records" in document]
    if with_records and len(with_records) < len(files):
        odd = next(file for file in files if file not in with_records)
        raise RecordError(odd, Fault("records", f"missing, but {with_records[0].name} has them"))
    if with_records:
        load = _from_records(documents)
    else:
        counts = [_from_counts(file, document) for file, document in documents]
        for file, count in zip(files, counts, strict=True):
            if count.shape[1:] != counts[0].shape[1:]:
                message = (
                    f"{list(count.shape[1:])}, expected {list(counts[0].shape[1:])} as in {files[0].name}"
                )
                raise RecordError(file, Fault(COUNT, message))
        load = counts[0] if len(counts) == 1 else _joined(path, counts)
    return _trimmed(path, load)


def write(path: str | os.PathLike[str], trace: LoadTrace) -> None:
    """Write the trace as a dump of mode stat, atomically; folders that are missing are made.

    Dense layers that the metadata name (first_moe_layer) are put in front, without tokens. Phases are lost.
    Raises RecordError for another suffix than .json and .pt, and when the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(path, Fault("", f"suffix {suffix!r}, expected {' or '.join(SUFFIXES)}"))
    first = trace.metadata.get("first_moe_layer", "0")
    dense = int(first) if re.fullmatch(r"\d{1,6}", first) else 0
    rest = {"average_utilization_rate_over_window": None}
    if suffix == ".pt":
        import torch

        load = np.pad(trace.expert_load, ((0, 0), (dense, 0), (0, 0)))
        torch_file.write(path, {"rank": 0, COUNT: torch.from_numpy(load), **rest})
        return

    def write_to(file: BinaryIO) -> None:
        file.write(f'{{"rank": 0, "{COUNT}": ['.encode())
        empty = [[0] * trace.num_logical_experts] * dense
        for step in range(trace.num_steps):
            file.write((",\n" if step else "\n").encode())
            file.write(json.dumps(empty + trace.expert_load[step].tolist()).encode())
        file.write(f"], {json.dumps(rest)[1:]}\n".encode())

    write_record(path, write_to)


def _files(path: Path) -> list[Path]:
    """The dumps, in the order of the time in their names: expert_distribution_recorder_<time>[_<rank>].pt"""
    if not path.is_dir():
        return [path]
    try:
        found = [file for file in path.iterdir() if file.suffix == ".pt"]
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error
    if not found:
        raise RecordError(path, Fault("", "no .pt files, expected the dumps of SGLang's recorder"))

    def moment(file: Path) -> tuple[float, str]:
        match = re.search(r"_(\d{1,15}(?:\.\d{1,15})?)(?:_\d+)?\.pt$", file.name)
        return (float(match[1]) if match else 0.0, file.name)

    return sorted(found, key=moment)


def _document(path: Path) -> dict[object, object]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(path, Fault("", f"suffix {suffix!r}, expected {' or '.join(SUFFIXES)}"))
    document = torch_file.read(path) if suffix == ".pt" else strict_json.read(path)
    if not isinstance(document, dict):
        raise RecordError(path, Fault("", f"{shown(document)}, expected an object with {COUNT}"))
    if isinstance(document, strict_json.RepeatedKeys):
        raise RecordError(
            path, Fault("", f"the key {shown(document.keys_given_twice[0])} stands more than once")
        )
    return cast("dict[object, object]", document)


def _from_counts(path: Path, document: dict[object, object]) -> NDArray[np.integer]:
    """[steps, layers, logical]"""
    if COUNT not in document:
        raise RecordError(path, Fault(COUNT, "missing, expected the dump of SGLang's recorder"))
    counts = _integers(path, COUNT, document[COUNT])
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or not all(0 < n <= _MAX_AXIS for n in counts.shape[1:]):
        raise RecordError(
            path, Fault(COUNT, f"shape {list(counts.shape)}, expected [steps, layers, experts]")
        )
    for start, chunk in _chunks(counts):
        if chunk.min(initial=0) < 0:
            step, layer, expert = np.argwhere(chunk < 0)[0]
            place = f"{COUNT}[{start + step}][{layer}][{expert}]"
            raise RecordError(path, Fault(place, f"{chunk[step, layer, expert]}, expected at least 0"))
    return counts


def _from_records(documents: list[tuple[Path, dict[object, object]]]) -> NDArray[np.int64]:
    """[forward passes, layers, logical]: counts of physical experts, summed over the ranks."""
    key = "last_physical_to_logical_map"
    first_file, first = documents[0]
    if key not in first:
        raise RecordError(first_file, Fault(key, "missing, expected [layers, physical]"))
    logical = _integers(first_file, key, first[key])
    if logical.ndim != 2 or not logical.size or not 0 <= logical.min() <= logical.max() < logical.shape[1]:
        message = f"{shown(logical.tolist())}, expected ids of experts, [layers, physical]"
        raise RecordError(first_file, Fault(key, message))
    by_pass: dict[int, NDArray[np.int64]] = {}
    seen: set[tuple[int, object]] = set()
    for path, document in documents:
        records = document["records"]
        if not isinstance(records, list):
            raise RecordError(path, Fault("records", f"{shown(records)}, expected a list"))
        for i, record in enumerate(records):
            place = f"records[{i}]"
            forward, rank, count = _record(path, place, record, logical.shape)
            if (forward, rank) in seen:
                message = f"forward pass {forward} of rank {rank} stands more than once"
                raise RecordError(path, Fault(place, message))
            seen.add((forward, rank))
            by_pass[forward] = by_pass.get(forward, 0) + count
    num_experts = int(logical.max()) + 1
    load = np.zeros((len(by_pass), len(logical), num_experts), dtype=np.int64)
    layers = np.arange(len(logical))[:, None]
    for step, forward in enumerate(sorted(by_pass)):
        np.add.at(load[step], (layers, logical), by_pass[forward])
    return load


def _record(
    path: Path, place: str, record: object, shape: tuple[int, ...]
) -> tuple[int, int, NDArray[np.int64]]:
    """forward_pass_id, rank, and global_physical_count as [layers, physical]"""
    if not isinstance(record, dict):
        raise RecordError(path, Fault(place, f"{shown(record)}, expected an object"))
    ids = []
    for key in ("forward_pass_id", "rank"):
        value = record.get(key)
        if type(value) is not int:
            raise RecordError(path, Fault(f"{place}.{key}", f"{shown(value)}, expected an integer"))
        ids.append(value)
    key = "global_physical_count"
    count = _integers(path, f"{place}.{key}", record.get(key))
    if count.shape != shape or count.min(initial=0) < 0:
        message = f"shape {list(count.shape)}, expected counts of at least 0, {list(shape)}"
        raise RecordError(path, Fault(f"{place}.{key}", message))
    return ids[0], ids[1], count.astype(np.int64)


def _integers(path: Path, place: str, value: object) -> NDArray[np.integer]:
    """A tensor, mapped and not loaded, or nested lists, as an array of int32 or int64."""
    if isinstance(value, list):
        array = _from_lists(path, place, value)
    else:
        import torch

        if not isinstance(value, torch.Tensor):
            raise RecordError(path, Fault(place, f"{shown(value)}, expected integers"))
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise RecordError(path, Fault(place, f"dtype {value.dtype}, expected integers"))
        array = value.detach().numpy()
    if array.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        if array.dtype.kind not in "iu" or array.dtype.itemsize > 4:
            raise RecordError(path, Fault(place, f"dtype {array.dtype}, expected int32 or int64"))
        array = array.astype(np.int64)
    return array


def _from_lists(path: Path, place: str, value: list[object]) -> NDArray[np.integer]:
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        raise RecordError(path, Fault(place, "ragged lists, expected lists of equal length")) from None
    if array.dtype.kind != "i" or _has_truth_value(value):
        raise RecordError(path, Fault(place, f"{shown(value)}, expected integers"))
    return array


def _has_truth_value(value: object) -> bool:
    """Whether true or false, which NumPy takes for 1 and 0, stands among the numbers."""
    if isinstance(value, list):
        if value and not isinstance(value[0], list):
            return bool in set(map(type, value))
        return any(map(_has_truth_value, value))
    return False


def _trimmed(path: str | os.PathLike[str], load: NDArray[np.integer]) -> LoadTrace:
    """Without steps and leading layers that have no token at all."""
    step_has_tokens = np.zeros(len(load), dtype=np.bool_)
    layer_has_tokens = np.zeros(load.shape[1], dtype=np.bool_)
    for start, chunk in _chunks(load):
        any_token = (chunk != 0).any(axis=2)
        step_has_tokens[start : start + len(chunk)] = any_token.any(axis=1)
        layer_has_tokens |= any_token.any(axis=0)
    if not step_has_tokens.any():
        raise RecordError(path, Fault("", "no token in any step, expected recorded load"))
    dense = int(layer_has_tokens.argmax())
    load = load[:, dense:]
    if not step_has_tokens.all():
        load = _selected(path, load, step_has_tokens)
    phase = np.full(len(load), _MIXED, dtype=np.uint8)
    return LoadTrace(load, phase, {"first_moe_layer": str(dense)} if dense else {})  # type: ignore[arg-type]


def _selected(
    path: str | os.PathLike[str], load: NDArray[np.integer], chosen: NDArray[np.bool_]
) -> NDArray[np.integer]:
    """The steps that are chosen."""
    room = _room(path, (int(chosen.sum()), *load.shape[1:]))
    end = 0
    for start, chunk in _chunks(load):
        part = chunk[chosen[start : start + len(chunk)]]
        room[end : end + len(part)] = part
        end += len(part)
    return room


def _joined(path: str | os.PathLike[str], parts: list[NDArray[np.integer]]) -> NDArray[np.integer]:
    """The steps of all parts, one after the other."""
    load = _room(path, (sum(map(len, parts)), *parts[0].shape[1:]))
    np.concatenate(parts, out=load, casting="same_kind")
    return load


def _room(path: str | os.PathLike[str], shape: tuple[int, ...]) -> NDArray[np.int64]:
    try:
        return spool.zeros(shape)
    except OSError as error:
        raise RecordError(path, Fault("", f"no room for the load: {describe(error)}")) from error


def _chunks(load: NDArray[np.integer]) -> Iterable[tuple[int, NDArray[np.integer]]]:
    """The steps in pieces of bounded size, each with the number of its first step."""
    steps = max(1, _CHUNK_BYTES // max(1, load[:1].nbytes))
    for start in range(0, len(load), steps):
        yield start, load[start : start + steps]
