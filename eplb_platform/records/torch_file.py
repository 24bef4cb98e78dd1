"""Files of torch.save, read without running anything that is in them."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, RecordError, describe, file_size, shown

_MAX_PICKLE_BYTES = 1 << 26
_MAX_CONTAINERS = 1 << 22


def read(path: str | os.PathLike[str]) -> dict[object, object]:
    """The dict in the file at `path`, its tensors memory-mapped, on the CPU.

    Read with torch.load(weights_only=True) alone. Raises RecordError for what that refuses, for what is no
    zip file as torch writes it (members uncompressed), and for anything but a dict.
    """
    file_size(path)
    _check_zip(path)
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(os.fspath(path), weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a broken pickle raises whatever its opcodes run into
        raise RecordError(path, Fault("", f"no plain torch file: {shown(str(error))}")) from error
    _check_tensors(path, content)
    if not isinstance(content, dict):
        raise RecordError(path, Fault("", f"{type(content).__name__}, expected a dict"))
    return content


def write(path: str | os.PathLike[str], content: dict[str, object]) -> None:
    """Write the dict to `path`, atomically; folders that are missing are made. Raises RecordError."""
    import torch

    def write_to(file: BinaryIO) -> None:
        torch.save(content, file)

    write_record(path, write_to)


def _check_zip(path: str | os.PathLike[str]) -> None:
    """Refuse what would unpack to more than the file is."""
    try:
        with Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(path, members)
            for member in members:
                if member.filename.endswith("data.pkl"):
                    _check_pickle(path, archive.read(member))
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(path, Fault("", "no zip file, expected one as torch.save writes it")) from error


def _check_pickle(path: str | os.PathLike[str], pickled: bytes) -> None:
    """Refuse what has more empty lists and dicts, a byte each, than memory may be taken for."""
    containers = pickled.count(b"]") + pickled.count(b"}")
    if containers > _MAX_CONTAINERS:
        raise RecordError(
            path, Fault("", f"{containers} lists and dicts, expected at most {_MAX_CONTAINERS}")
        )


def _check_tensors(path: str | os.PathLike[str], content: object) -> None:
    """Refuse a tensor that has more elements than the file holds for it: strides of 0 cost nothing there."""
    import torch

    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            is_plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not is_plain or value.nbytes > value.untyped_storage().nbytes():
                message = f"a tensor of {list(value.shape)}, expected one whose elements are all in the file"
                raise RecordError(path, Fault("", message))
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += [*value.keys(), *value.values()] if isinstance(value, dict) else value


def _check_members(path: str | os.PathLike[str], members: Sequence[zipfile.ZipInfo]) -> None:
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise RecordError(
                path, Fault(shown(member.filename), "compressed, expected an uncompressed member")
            )
        if member.filename.endswith("data.pkl") and member.file_size > _MAX_PICKLE_BYTES:
            raise RecordError(
                path,
                Fault(
                    shown(member.filename), f"{member.file_size} bytes, expected at most {_MAX_PICKLE_BYTES}"
                ),
            )
