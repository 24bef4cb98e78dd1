"""The load trace: the expert load of every step, in a .safetensors file.

    expert_load: int32 or int64 [steps, layers, logical], tokens per logical expert
    phase: uint8 [steps], 0 prefill, 1 decode, 2 mixed
    metadata: text by text, of which `format_version` is always there

The file is read through memory mapping and written without ever being held in memory, neither of which the
safetensors library does for NumPy; so its header, which is JSON, is read and written here.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from eplb_platform.records import strict_json
from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, RecordError, describe, file_size, shown

FORMAT_VERSION = "1"
NUM_PHASES = 3

_Path: TypeAlias = str | os.PathLike[str]
_Load: TypeAlias = NDArray[np.int32] | NDArray[np.int64]

_DTYPE_OF_NAME: dict[str, np.dtype[np.integer]] = {
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
_LOAD_DTYPES = ("I32", "I64")
_MAX_HEADER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 22
# Layers or experts: far above any model, and far below what overflows NumPy's sizes.
_MAX_ROW_AXIS = 1 << 20


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """The expert load of a run, step by step.

    expert_load: [steps, layers, logical], tokens per logical expert; memory-mapped when it was read
    phase: [steps], 0 prefill, 1 decode, 2 mixed
    metadata: what the run was: model, num_experts_per_token, first_moe_layer
    """

    expert_load: _Load
    phase: NDArray[np.uint8]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        return int(self.expert_load.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.expert_load.shape[1])

    @property
    def num_logical_experts(self) -> int:
        return int(self.expert_load.shape[2])


def read(path: _Path) -> LoadTrace:
    """The trace in the file at `path`, mapped and not loaded.

    Its values are checked chunk by chunk. Raises RecordError with the place of what is wrong.
    """
    file_size(path)
    try:
        # One open file for everything: another trace may be put at the path meanwhile.
        with Path(path).open("rb") as file:
            trace = _map_trace(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error
    _check_values(path, trace)
    return trace


def write(path: _Path, trace: LoadTrace) -> None:
    """Write the trace to `path`, atomically; folders that are missing are made. Raises RecordError."""
    if trace.phase.shape != (trace.num_steps,):
        raise RecordError(path, Fault("phase", f"{trace.phase.size} steps, expected {trace.num_steps}"))
    _check_values(path, trace)
    name = _load_dtype(trace.expert_load.dtype)

    def write_to(file: BinaryIO) -> None:
        file.write(_header(name, trace.expert_load.shape, trace.metadata))
        for _, chunk in _chunks(trace.expert_load):
            file.write(chunk.astype(_DTYPE_OF_NAME[name]).tobytes())
        file.write(trace.phase.astype(np.uint8).tobytes())

    write_record(path, write_to)


def release_pages(load: NDArray[np.integer]) -> None:
    """Give back the memory of a mapped load, which is read from its file again when it is used again.

    For those who go through a load from beginning to end: what they have read stays in memory otherwise.
    """
    base: object = load
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


class LoadTraceWriter:
    """Writes a trace while it happens, in bounded memory: one byte is kept for each step.

    Rows are gathered in `<path>.partial`, beside the trace, which is whole at every moment: it is made by
    `checkpoint` and `close`. One thread may append while another makes a checkpoint. What was appended
    after the last checkpoint is lost with the process.

    Raises RecordError when the files cannot be written, or another writer is at work on them.
    """

    def __init__(
        self,
        path: _Path,
        *,
        num_layers: int,
        num_logical_experts: int,
        metadata: Mapping[str, str] | None = None,
        dtype: DTypeLike = np.int32,
    ) -> None:
        """metadata: texts for the header; dtype: of the counts, int32 or int64"""
        self.path = Path(path)
        self._row_shape = (num_layers, num_logical_experts)
        self._dtype_name = _load_dtype(dtype)
        self._dtype = _DTYPE_OF_NAME[self._dtype_name]
        self._metadata = dict(metadata or {})
        self._phases = bytearray()
        self._published_steps = -1
        self._row_bytes = prod(self._row_shape) * self._dtype.itemsize
        self._check_form()
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._appending = Lock()
        self._publishing = Lock()
        self._spool: int | None = self._open_spool()

    @property
    def num_steps(self) -> int:
        return len(self._phases)

    def append(self, expert_load: ArrayLike, phase: int) -> None:
        """Add a step.

        expert_load: [layers, logical] integers, tokens per logical expert
        phase: 0 prefill, 1 decode, 2 mixed

        Costs one write to the page cache. Raises ValueError for another shape or type, a negative count,
        one that the dtype cannot hold, and an unknown phase; RecordError when the disk is full: the step
        is left out then, and the next may be tried.
        """
        row = self._checked_row(expert_load, phase)
        with self._appending:
            rest = row.data.cast("B")
            # At its place whatever was there, so that a row that was cut short is overwritten.
            offset = len(self._phases) * self._row_bytes
            try:
                while rest:
                    written = os.pwrite(self._open_descriptor(), rest, offset)
                    rest, offset = rest[written:], offset + written
            except OSError as error:
                raise RecordError(self._partial, Fault("", describe(error))) from error
            self._phases.append(phase)

    def checkpoint(self) -> bool:
        """Make the trace of all steps so far, unless it has not yet doubled; whether it was made.

        So all checkpoints together write no more than twice the trace. Slow: for a background thread.
        """
        with self._publishing:
            self._open_descriptor()
            if self.num_steps < max(1, 2 * self._published_steps):
                return False
            self._publish()
            return True

    def close(self) -> None:
        """Make the trace of all steps and remove the partial file. Does nothing the second time."""
        with self._publishing:
            if self._spool is None:
                return
            try:
                if self._published_steps < self.num_steps:
                    self._publish()
            finally:
                with self._appending:
                    self._partial.unlink(missing_ok=True)
                    os.close(self._spool)
                    self._spool = None

    def __enter__(self) -> LoadTraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_form(self) -> None:
        if not all(0 < n <= _MAX_ROW_AXIS for n in self._row_shape):
            raise ValueError(
                f"[layers, logical] is {list(self._row_shape)}, expected 1 to {_MAX_ROW_AXIS} of each"
            )
        for key, value in self._metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(f"metadata {shown(key)} is {shown(value)}, expected text for text")
        _header(self._dtype_name, (10**15, *self._row_shape), self._metadata)  # the longest that may come

    def _open_spool(self) -> int:
        spool = -1
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            spool = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(spool, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Only now: what a writer left that was killed is of no use, what one at work has is its own.
            os.ftruncate(spool, 0)
        except BlockingIOError as error:
            os.close(spool)
            raise RecordError(self._partial, Fault("", "another writer is at work on it")) from error
        except OSError as error:
            if spool >= 0:
                os.close(spool)
            raise RecordError(self._partial, Fault("", describe(error))) from error
        return spool

    def _open_descriptor(self) -> int:
        if self._spool is None:
            raise ValueError(f"{self.path}: the writer is closed")
        return self._spool

    def _checked_row(self, expert_load: ArrayLike, phase: int) -> _Load:
        load = np.asarray(expert_load)
        if load.shape != self._row_shape or not np.issubdtype(load.dtype, np.integer):
            raise ValueError(
                f"expert load is {load.dtype} {list(load.shape)}, expected integers {list(self._row_shape)}"
            )
        if not 0 <= phase < NUM_PHASES:
            raise ValueError(f"phase is {phase}, expected 0 to {NUM_PHASES - 1}")
        largest = np.iinfo(self._dtype).max
        if load.min() < 0 or load.max() > largest:
            layer, expert = np.argwhere((load < 0) | (load > largest))[0]
            raise ValueError(
                f"layer {layer}: expert {expert} has {load[layer, expert]} tokens, expected 0 to {largest}"
            )
        return cast(_Load, np.ascontiguousarray(load, dtype=self._dtype))

    def _publish(self) -> None:
        with self._appending:
            phases = bytes(self._phases)
        write_record(self.path, lambda file: self._write_trace(file, phases))
        self._published_steps = len(phases)

    def _write_trace(self, file: BinaryIO, phases: bytes) -> None:
        file.write(_header(self._dtype_name, (len(phases), *self._row_shape), self._metadata))
        offset, end = 0, len(phases) * self._row_bytes
        while offset < end:
            chunk = os.pread(self._open_descriptor(), min(_CHUNK_BYTES, end - offset), offset)
            if not chunk:
                raise RecordError(self._partial, Fault("", f"cut short by another program at {offset}"))
            file.write(chunk)
            offset += len(chunk)
        file.write(phases)


def _header(dtype_name: str, shape: Sequence[int], metadata: Mapping[str, str]) -> bytes:
    """The file's beginning, for a load of that dtype and shape."""
    steps = shape[0]
    load_end = prod(shape) * _DTYPE_OF_NAME[dtype_name].itemsize
    header = {
        "__metadata__": {**metadata, "format_version": FORMAT_VERSION},
        "expert_load": {"dtype": dtype_name, "shape": list(shape), "data_offsets": [0, load_end]},
        "phase": {"dtype": "U8", "shape": [steps], "data_offsets": [load_end, load_end + steps]},
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    # Spaces up to a multiple of 8, so that the counts are aligned in memory.
    text = text.ljust(-(-len(text) // 8) * 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ValueError(f"the trace's header has {len(text)} bytes, expected at most {_MAX_HEADER_BYTES}")
    return struct.pack("<Q", len(text)) + text


def _load_dtype(dtype: DTypeLike) -> str:
    """The file's name of int32 or int64."""
    for name in _LOAD_DTYPES:
        if np.dtype(dtype).newbyteorder("<") == _DTYPE_OF_NAME[name]:
            return name
    raise ValueError(f"dtype is {np.dtype(dtype)}, expected int32 or int64")


@dataclass(frozen=True)
class _Layout:
    """Where a tensor lies in the file."""

    dtype: np.dtype[np.integer]
    shape: tuple[int, ...]
    offset: int

    def map(self, file: BinaryIO) -> NDArray[np.integer]:
        if not prod(self.shape):
            return np.zeros(self.shape, dtype=self.dtype)  # nothing cannot be mapped
        return np.memmap(file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


def _map_trace(path: _Path, file: BinaryIO, size: int) -> LoadTrace:
    header, data_start = _read_header(path, file, size)
    load = _layout(path, header, "expert_load", data_start, size)
    phase = _layout(path, header, "phase", data_start, size)
    if phase.shape != load.shape[:1]:
        raise RecordError(path, Fault("phase", f"{phase.shape[0]} steps, expected {load.shape[0]}"))
    metadata = _metadata(path, header)
    return LoadTrace(cast(_Load, load.map(file)), cast("NDArray[np.uint8]", phase.map(file)), metadata)


def _read_header(path: _Path, file: BinaryIO, size: int) -> tuple[strict_json.Object, int]:
    """The header, and the offset at which the data starts."""
    if size < 8:
        raise RecordError(path, Fault("", f"{size} bytes, expected a .safetensors file"))
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise RecordError(path, Fault("", f"a header of {length} bytes, expected a .safetensors file"))
    header = strict_json.parse(path, file.read(length))
    if not isinstance(header, dict) or isinstance(header, strict_json.RepeatedKeys):
        raise RecordError(path, Fault("header", "expected one object with the tensors by their names"))
    return header, 8 + length


def _layout(path: _Path, header: strict_json.Object, name: str, data_start: int, size: int) -> _Layout:
    """Where tensor `name` lies, checked against the file's size and what a trace has."""
    dtypes, num_dimensions = (("U8",), 1) if name == "phase" else (_LOAD_DTYPES, 3)
    entry = header.get(name)
    if not isinstance(entry, dict):
        raise RecordError(path, Fault(name, "missing, expected a tensor"))
    if entry.get("dtype") not in dtypes:
        given = shown(entry.get("dtype"))
        raise RecordError(path, Fault(f"{name}.dtype", f"{given}, expected {' or '.join(dtypes)}"))
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if shape is None or len(shape) != num_dimensions or not all(0 < n <= _MAX_ROW_AXIS for n in shape[1:]):
        axes = "[steps]" if name == "phase" else "[steps, layers, logical]"
        raise RecordError(path, Fault(f"{name}.shape", f"{shown(entry.get('shape'))}, expected {axes}"))
    dtype = _DTYPE_OF_NAME[str(entry["dtype"])]
    nbytes = prod(shape) * dtype.itemsize
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        given = shown(entry.get("data_offsets"))
        raise RecordError(path, Fault(f"{name}.data_offsets", f"{given}, expected {nbytes} bytes"))
    if data_start + offsets[1] > size:
        raise RecordError(
            path, Fault(name, f"ends at byte {data_start + offsets[1]} of a file of {size} bytes")
        )
    return _Layout(dtype, tuple(shape), data_start + offsets[0])


def _counts(value: object) -> list[int] | None:
    """`value` if it is a list of integers that are not negative."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None


def _metadata(path: _Path, header: strict_json.Object) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RecordError(path, Fault("__metadata__", f"{shown(metadata)}, expected text by text"))
    version = metadata.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        message = f"{shown(version)}, expected {FORMAT_VERSION!r}: a later eplb_platform wrote it"
        raise RecordError(path, Fault("__metadata__.format_version", message))
    return metadata


def _check_values(path: _Path, trace: LoadTrace) -> None:
    unknown = np.flatnonzero(trace.phase >= NUM_PHASES)
    if unknown.size:
        step = unknown[0]
        message = f"{trace.phase[step]}, expected 0 to {NUM_PHASES - 1}"
        raise RecordError(path, Fault(f"phase[{step}]", message))
    for start, chunk in _chunks(trace.expert_load):
        if chunk.min() < 0:
            step, layer, expert = np.argwhere(chunk < 0)[0]
            place = f"expert_load[{start + step}][{layer}][{expert}]"
            raise RecordError(path, Fault(place, f"{chunk[step, layer, expert]}, expected at least 0"))


def _chunks(load: _Load) -> Iterator[tuple[int, _Load]]:
    """The steps in pieces of bounded size, each with the number of its first step."""
    steps = max(1, _CHUNK_BYTES // max(1, load[:1].nbytes))
    for start in range(0, load.shape[0], steps):
        yield start, load[start : start + steps]
        release_pages(load)
