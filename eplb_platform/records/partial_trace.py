"""The partial load trace: what a writer has gathered so far, which outlives the writer.

    8 bytes      MAGIC
    8 bytes      length of the header, little-endian
    header       JSON: format_version, dtype (I32 or I64), shape [layers, logical], metadata: text by text
    rows         one for each step: the counts, the phase (uint8), 3 zeros, the CRC-32 of counts and phase

It ends wherever its writer was killed. The trace is the rows up to the first that is cut short or has a wrong
sum, such as a row that never reached the disk: zeros lie in its place, and their CRC-32 is not 0.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from eplb_platform.records import strict_json
from eplb_platform.records.fault import Fault, RecordError, shown

SUFFIX = ".partial"
MAGIC = b"EPLBPART"
FORMAT_VERSION = "1"
MAX_HEADER_BYTES = 1 << 20
# Layers or experts: far above any model, and far below what overflows NumPy's sizes.
MAX_ROW_AXIS = 1 << 20
# Of a step: more than a thousand layers of ten thousand experts, and little enough to add steps up.
MAX_ROW_COUNTS = 1 << 24
COUNT_DTYPES: dict[str, np.dtype[np.integer]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}

_TRAILER = struct.Struct("<B3xI")
_CHUNK_BYTES = 1 << 22
_ROWS_LOOKED_AT = 1024
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

_Path: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class RowForm:
    """What every row of a trace is.

    dtype_name: of the counts, I32 or I64
    shape: layers and logical experts
    metadata: what the run was, text by text
    """

    dtype_name: str
    shape: tuple[int, int]
    metadata: Mapping[str, str]

    @property
    def dtype(self) -> np.dtype[np.integer]:
        return COUNT_DTYPES[self.dtype_name]

    @property
    def load_bytes(self) -> int:
        """Of the counts of a step."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.load_bytes + _TRAILER.size

    def header(self) -> bytes:
        """The beginning of the file."""
        fields = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype_name,
            "shape": list(self.shape),
            "metadata": dict(self.metadata),
        }
        return MAGIC + sized_json(fields)

    def row(self, load: NDArray[np.integer], phase: int) -> bytes:
        """A step as it stands in the file; load: [layers, logical], contiguous, of this dtype."""
        counts = load.data.cast("B")
        return b"".join((counts, _TRAILER.pack(phase, _checksum(counts, phase))))


@dataclass(frozen=True, eq=False)
class Rows:
    """The whole rows of a partial trace.

    expert_load: [steps, layers, logical], memory-mapped, with gaps between the steps
    phase: [steps]
    """

    form: RowForm
    expert_load: NDArray[np.integer]
    phase: NDArray[np.uint8]


@dataclass(frozen=True)
class State:
    """How a partial trace stands.

    num_rows: rows of full length
    num_steps: those up to the last one that is whole
    at_work: whether a writer is at work on it
    """

    num_rows: int
    num_steps: int
    at_work: bool


def is_row_shape(shape: Sequence[int]) -> bool:
    """Whether a step of [layers, logical] counts may be this large."""
    return all(0 < n <= MAX_ROW_AXIS for n in shape) and prod(shape) <= MAX_ROW_COUNTS


def sized_json(fields: Mapping[str, object]) -> bytes:
    """Length and text, as safetensors has them too: with spaces up to a multiple of 8, so that the counts
    behind it are aligned in memory.
    """
    text = json.dumps(fields, ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text


def beside(path: _Path) -> Path:
    """Where the writer of the trace at `path` gathers its rows."""
    return Path(f"{os.fspath(path)}{SUFFIX}")


def is_partial(file: BinaryIO) -> bool:
    """Whether an open file begins as a partial trace does."""
    return os.pread(file.fileno(), len(MAGIC), 0) == MAGIC


def begins_at(path: _Path) -> bool:
    """Whether there is a file at `path` that begins as a partial trace does."""
    place = Path(path)
    try:
        if not place.is_file():  # opening a pipe would wait for its writer
            return False
        with place.open("rb") as file:
            return is_partial(file)
    except (OSError, ValueError):  # a null byte in the path
        return False


def read(path: _Path, file: BinaryIO) -> Rows:
    """The whole rows of the open file, mapped. Raises RecordError for a header that cannot be read.

    A writer may go on with the file meanwhile: these are the rows that were whole.
    """
    form, start, num_rows = _form(path, file)
    rows = _mapped(file, form, start, num_rows)
    phase = _whole_phases(rows)
    counts = rows[: phase.size, : form.load_bytes].view(form.dtype)
    return Rows(form, counts.reshape(phase.size, *form.shape), phase)


def state(path: _Path) -> State | None:
    """How the partial trace at `path` stands; None where there is none.

    Looks at few rows, if one of the last is whole.
    """
    if not begins_at(path):
        return None
    try:
        with Path(path).open("rb") as file:
            at_work = _is_locked(file)
            form, start, num_rows = _form(path, file)
            rows = _mapped(file, form, start, num_rows)
    except (OSError, ValueError):  # as a RecordError is
        return None
    return State(num_rows, _steps_to_the_last_whole(rows), at_work)


def lock(file: BinaryIO | int, operation: int) -> None:
    """flock; does nothing on a file system without locks, as a cluster's may be. Raises OSError."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _steps_to_the_last_whole(rows: NDArray[np.uint8]) -> int:
    """Where many rows at the end are not whole, up to the first that is not: a file may be all holes."""
    num_rows = len(rows)
    for step in range(num_rows, max(0, num_rows - _ROWS_LOOKED_AT), -1):
        if _is_whole(rows[step - 1]):
            return step
    return _whole_phases(rows).size


def _is_locked(file: BinaryIO) -> bool:
    try:
        lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    lock(file, fcntl.LOCK_UN)
    return False


def _mapped(file: BinaryIO, form: RowForm, start: int, num_rows: int) -> NDArray[np.uint8]:
    """[rows, bytes of a row]"""
    if not num_rows:
        return np.zeros((0, form.row_bytes), dtype=np.uint8)  # nothing cannot be mapped
    return np.memmap(file, dtype=np.uint8, mode="r", offset=start, shape=(num_rows, form.row_bytes))


def _whole_phases(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[steps], the phases of the rows before the first that is not whole."""
    plain = rows.view(np.ndarray)  # which is indexed much faster than a memmap
    mapping: object = rows.base
    at_once = max(1, _CHUNK_BYTES // rows.shape[1])
    phases = bytearray()
    for step, row in enumerate(plain):
        if not _is_whole(row):
            break
        phases.append(row[-_TRAILER.size])
        if step % at_once == 0 and isinstance(mapping, mmap.mmap):
            mapping.madvise(mmap.MADV_DONTNEED)
    return np.frombuffer(bytes(phases), dtype=np.uint8)


def _is_whole(row: NDArray[np.uint8]) -> bool:
    counts, trailer = row.data[: -_TRAILER.size], row.data[-_TRAILER.size :]
    phase, checksum = _TRAILER.unpack(trailer)
    return bool(_checksum(counts, phase) == checksum)


def _checksum(counts: memoryview, phase: int) -> int:
    return zlib.crc32(bytes([phase]), zlib.crc32(counts))


def _form(path: _Path, file: BinaryIO) -> tuple[RowForm, int, int]:
    """What the rows are, the offset of the first one, and how many of full length there are."""
    size, descriptor, front = os.fstat(file.fileno()).st_size, file.fileno(), len(MAGIC) + 8
    length = int.from_bytes(os.pread(descriptor, 8, len(MAGIC)), "little")
    if length > MAX_HEADER_BYTES:
        message = f"{length} bytes, expected at most {MAX_HEADER_BYTES} of a partial trace"
        raise RecordError(path, Fault("header", message))
    if size < front + length:
        raise RecordError(path, Fault("header", "cut short: the writer was killed before its first step"))
    form = _parsed(path, strict_json.parse(path, os.pread(descriptor, length, front)))
    start = front + length
    return form, start, (size - start) // form.row_bytes


def _parsed(path: _Path, header: object) -> RowForm:
    if not isinstance(header, dict) or isinstance(header, strict_json.RepeatedKeys):
        raise RecordError(path, Fault("header", "expected one object that says what the rows are"))
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        message = f"{shown(version)}, expected {FORMAT_VERSION!r}: another eplb_platform wrote it"
        raise RecordError(path, Fault("header.format_version", message))
    dtype, shape, metadata = (header.get(key) for key in ("dtype", "shape", "metadata"))
    if not isinstance(dtype, str) or dtype not in COUNT_DTYPES:
        raise RecordError(path, Fault("header.dtype", f"{shown(dtype)}, expected I32 or I64"))
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(n) is int for n in shape)
        or not is_row_shape(shape)
    ):
        raise RecordError(path, Fault("header.shape", f"{shown(shape)}, expected [layers, logical]"))
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise RecordError(path, Fault("header.metadata", f"{shown(metadata)}, expected text by text"))
    return RowForm(dtype, cast("tuple[int, int]", tuple(shape)), cast("dict[str, str]", metadata))
