"""The load trace: the expert load of every step, in a .safetensors file.

    expert_load: int32 or int64 [steps, layers, logical], tokens per logical expert
    phase: uint8 [steps], 0 prefill, 1 decode, 2 mixed
    metadata: text by text, of which `format_version` is always there

What a writer that was killed left of one, its partial file, is read as the trace of its steps.

The file is read through memory mapping and written without ever being held in memory, neither of which the
safetensors library does for NumPy; so its header, which is JSON, is read and written here.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from eplb_platform.records import partial_trace, strict_json
from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, RecordError, describe, file_size, shown
from eplb_platform.records.partial_trace import (
    COUNT_DTYPES,
    MAX_HEADER_BYTES,
    MAX_ROW_AXIS,
    MAX_ROW_COUNTS,
    RowForm,
    is_row_shape,
)

FORMAT_VERSION = "1"
NUM_PHASES = 3

_Path: TypeAlias = str | os.PathLike[str]
_Load: TypeAlias = NDArray[np.int32] | NDArray[np.int64]

_DTYPE_OF_NAME: dict[str, np.dtype[np.integer]] = {**COUNT_DTYPES, "U8": np.dtype("u1")}
_CHUNK_BYTES = 1 << 22
# A command that looks whether a partial file is at work holds its lock for a moment.
_LOCK_TRIES, _LOCK_PAUSE_S = 5, 0.02


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
    """The trace in the file at `path`, mapped and not loaded; of a partial file, the steps that are whole.

    Its values are checked chunk by chunk. Raises RecordError with the place of what is wrong.
    """
    file_size(path)
    try:
        # One open file for everything: another trace may be put at the path meanwhile.
        with Path(path).open("rb") as file:
            if partial_trace.is_partial(file):
                trace = _partial(path, file)
            else:
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
    """Writes a trace while it happens, in bounded memory.

    Rows are gathered in `<path>.partial`, beside the trace, which is whole at every moment: it is made by
    `checkpoint` and `close`. One thread may append while another makes a checkpoint. When the process is
    killed, the steps since the last checkpoint are in the partial file, which `read` takes for a trace. The
    next writer renames it to `<path>.partial.1`, see `kept`; of several killed runs the longest stays there.

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
        self.kept: Path | None = None
        """Where a partial file is now that was there already."""
        self._form = RowForm(_load_dtype(dtype), (num_layers, num_logical_experts), dict(metadata or {}))
        self._check_form()
        self._start = len(self._form.header())
        self._num_steps = 0
        self._published_steps = -1
        self._partial = partial_trace.beside(self.path)
        self._appending = Lock()
        self._publishing = Lock()
        self._spool: int | None = self._open_spool()

    @property
    def num_steps(self) -> int:
        return self._num_steps

    def append(self, expert_load: ArrayLike, phase: int) -> None:
        """Add a step.

        expert_load: [layers, logical] integers, tokens per logical expert
        phase: 0 prefill, 1 decode, 2 mixed

        Costs one write to the page cache. Raises ValueError for another shape or type, a negative count,
        one that the dtype cannot hold, and an unknown phase; RecordError when the disk is full: the step
        is left out then, and the next may be tried.
        """
        row = self._form.row(self._checked_row(expert_load, phase), phase)
        with self._appending:
            try:
                # At its place whatever was there, so that a row that was cut short is overwritten.
                _write_at(self._open_descriptor(), row, self._offset(self._num_steps))
            except OSError as error:
                raise RecordError(self._partial, Fault("", describe(error))) from error
            self._num_steps += 1

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
        """Make the trace of all steps and remove the partial file, which stays where that fails.

        Does nothing the second time.
        """
        with self._publishing:
            if self._spool is None:
                return
            try:
                if self._published_steps < self.num_steps:
                    self._publish()
                _remove(self._partial, self._spool)
            finally:
                with self._appending:
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
        if not is_row_shape(self._form.shape):
            raise ValueError(
                f"[layers, logical] is {list(self._form.shape)}, expected 1 to {MAX_ROW_AXIS} of each and "
                f"{MAX_ROW_COUNTS} counts at most"
            )
        for key, value in self._form.metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(f"metadata {shown(key)} is {shown(value)}, expected text for text")
        self._header(10**15)  # the longest that may come

    def _open_spool(self) -> int:
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            spool = self._lock_spool()
        except BlockingIOError as error:
            raise RecordError(self._partial, Fault("", "another writer is at work on it")) from error
        except OSError as error:
            raise RecordError(self._partial, Fault("", describe(error))) from error
        return spool

    def _lock_spool(self) -> int:
        """A new partial file, locked and with its header. What was there is kept, if it is worth it, and
        never cut: a command may have mapped it.
        """
        spool = _open_locked(self._partial)
        try:
            if os.fstat(spool).st_size:
                kept = _put_aside(self._partial)
                earlier, spool = spool, _open_locked(self._partial)
                os.close(earlier)
                self.kept = kept
            _write_at(spool, self._form.header(), 0)
        except BaseException:
            os.close(spool)
            raise
        return spool

    def _open_descriptor(self) -> int:
        if self._spool is None:
            raise ValueError(f"{self.path}: the writer is closed")
        return self._spool

    def _checked_row(self, expert_load: ArrayLike, phase: int) -> _Load:
        load = np.asarray(expert_load)
        if load.shape != self._form.shape or not np.issubdtype(load.dtype, np.integer):
            raise ValueError(
                f"expert load is {load.dtype} {list(load.shape)}, expected integers {list(self._form.shape)}"
            )
        if not 0 <= phase < NUM_PHASES:
            raise ValueError(f"phase is {phase}, expected 0 to {NUM_PHASES - 1}")
        largest = np.iinfo(self._form.dtype).max
        if load.min() < 0 or load.max() > largest:
            layer, expert = np.argwhere((load < 0) | (load > largest))[0]
            raise ValueError(
                f"layer {layer}: expert {expert} has {load[layer, expert]} tokens, expected 0 to {largest}"
            )
        return cast(_Load, np.ascontiguousarray(load, dtype=self._form.dtype))

    def _publish(self) -> None:
        with self._appending:
            steps = self._num_steps
        write_record(self.path, lambda file: self._write_trace(file, steps))
        self._published_steps = steps

    def _write_trace(self, file: BinaryIO, steps: int) -> None:
        file.write(self._header(steps))
        phases = bytearray()
        at_once = max(1, _CHUNK_BYTES // self._form.row_bytes)
        for start in range(0, steps, at_once):
            rows = self._read_rows(start, min(at_once, steps - start))
            file.write(rows[:, : self._form.load_bytes].tobytes())
            phases += rows[:, self._form.load_bytes].tobytes()
        file.write(phases)

    def _read_rows(self, start: int, count: int) -> NDArray[np.uint8]:
        """[rows, bytes of a row], `count` of them from row `start` on."""
        rows = np.empty((count, self._form.row_bytes), dtype=np.uint8)
        rest, offset = rows.data.cast("B"), self._offset(start)
        while rest:
            read = os.preadv(self._open_descriptor(), [rest], offset)
            if not read:
                raise RecordError(self._partial, Fault("", f"cut short by another program at {offset}"))
            rest, offset = rest[read:], offset + read
        return rows

    def _offset(self, step: int) -> int:
        return self._start + step * self._form.row_bytes

    def _header(self, steps: int) -> bytes:
        return _header(self._form.dtype_name, (steps, *self._form.shape), self._form.metadata)


def _open_locked(path: Path) -> int:
    """A descriptor of the file at `path`, made if need be, for the only writer of it.

    Raises BlockingIOError while another is at work on it.
    """
    for attempt in range(_LOCK_TRIES):
        time.sleep(_LOCK_PAUSE_S if attempt else 0)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            partial_trace.lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another writer may have renamed or removed what was opened before it was locked.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _remove(path: Path, descriptor: int) -> None:
    """Remove the open file, unless it was moved away: another writer's may be at `path` then."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            path.unlink()


def _put_aside(partial: Path) -> Path | None:
    """Make room for a new file at `partial`. Where the file there is now; None where it was removed."""
    kept = _name_to_keep(partial)
    if kept is None:
        partial.unlink()
    else:
        partial.rename(kept)
    return kept


def _name_to_keep(partial: Path) -> Path | None:
    """Where the file at `partial` goes; None where it is not worth keeping: an engine that is killed and
    started again and again fills no disk with what it leaves. A file of somebody else is never replaced.
    """
    first = Path(f"{partial}.1")
    left, kept = partial_trace.state(partial), partial_trace.state(first)
    if left is None or (kept is None and os.path.lexists(first)):
        return next(name for n in count(1) if not os.path.lexists(name := Path(f"{partial}.{n}")))
    return first if left.num_steps > (0 if kept is None else kept.num_steps) else None


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _header(dtype_name: str, shape: Sequence[int], metadata: Mapping[str, str]) -> bytes:
    """The file's beginning, for a load of that dtype and shape."""
    steps = shape[0]
    load_end = prod(shape) * _DTYPE_OF_NAME[dtype_name].itemsize
    header = {
        "__metadata__": {**metadata, "format_version": FORMAT_VERSION},
        "expert_load": {"dtype": dtype_name, "shape": list(shape), "data_offsets": [0, load_end]},
        "phase": {"dtype": "U8", "shape": [steps], "data_offsets": [load_end, load_end + steps]},
    }
    sized = partial_trace.sized_json(header)
    length = len(sized) - 8
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"the trace's header has {length} bytes, expected at most {MAX_HEADER_BYTES}")
    return sized


def _load_dtype(dtype: DTypeLike) -> str:
    """The file's name of int32 or int64."""
    for name in COUNT_DTYPES:
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


def _partial(path: _Path, file: BinaryIO) -> LoadTrace:
    rows = partial_trace.read(path, file)
    metadata = {**rows.form.metadata, "format_version": FORMAT_VERSION}
    return LoadTrace(cast(_Load, rows.expert_load), rows.phase, metadata)


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
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise RecordError(path, Fault("", f"a header of {length} bytes, expected a .safetensors file"))
    header = strict_json.parse(path, file.read(length))
    if not isinstance(header, dict) or isinstance(header, strict_json.RepeatedKeys):
        raise RecordError(path, Fault("header", "expected one object with the tensors by their names"))
    return header, 8 + length


def _layout(path: _Path, header: strict_json.Object, name: str, data_start: int, size: int) -> _Layout:
    """Where tensor `name` lies, checked against the file's size and what a trace has."""
    dtypes, num_dimensions = (("U8",), 1) if name == "phase" else (COUNT_DTYPES, 3)
    entry = header.get(name)
    if not isinstance(entry, dict):
        raise RecordError(path, Fault(name, "missing, expected a tensor"))
    if entry.get("dtype") not in dtypes:
        given = shown(entry.get("dtype"))
        raise RecordError(path, Fault(f"{name}.dtype", f"{given}, expected {' or '.join(dtypes)}"))
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if shape is None or len(shape) != num_dimensions or not is_row_shape(shape[1:]):
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
