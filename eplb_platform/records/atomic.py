"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from eplb_platform.records.fault import Fault, RecordError, describe


def write_atomically(
    path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], None], *, durable: bool = True
) -> None:
    """Put `content` at `path` so that at every moment a reader finds the old file or the new one, complete.

    content: the bytes, or a function that writes them to the open file
    durable: whether the file is on the disk, for a loss of power, when this returns

    Makes the folders that are missing; a symbolic link is followed, not replaced. When writing fails the
    old file stays, nothing else is left behind, and the error, an OSError or the function's own, goes on
    to the caller.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        # The rename would fail too, with a message that names the temporary file.
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is only atomic within a file system.
    temporary = target.parent / f".{secrets.token_hex(8)}.partial"
    try:
        with temporary.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == os.fspath(temporary):
            error.filename, error.filename2 = os.fspath(path), None  # nobody asked for the temporary one
        raise
    if durable:
        _sync_folder(target.parent)


def write_record(path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], None]) -> None:
    """As `write_atomically`; raises RecordError, with the path and the system's reason, where it cannot."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error


def _sync_folder(folder: Path) -> None:
    """Make the rename outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
