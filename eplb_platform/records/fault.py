"""What is wrong with a record, and where."""

from __future__ import annotations

import os
import reprlib
import stat
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault of a file.

    place: where in the file, as `layer_list[3].device_count`; empty for the file as a whole
    message: what is there and what was expected
    """

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


class Faults:
    """The faults of one file: the first ones kept, all counted."""

    def __init__(self, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._first: list[Fault] = []

    def add(self, place: str, message: str) -> None:
        self.count += 1
        if len(self._first) < self._limit:
            self._first.append(Fault(place, message))

    def add_all(self, count: int, fault_at: Callable[[int], tuple[str, str]]) -> None:
        """Add `count` faults, the place and the message of each given by its number."""
        kept = min(count, self._limit - len(self._first))
        for number in range(kept):
            self.add(*fault_at(number))
        self.count += count - kept

    def __bool__(self) -> bool:
        return self.count > 0

    def listed(self) -> list[Fault]:
        """The first faults, and one more that counts the rest if there is one."""
        rest = self.count - len(self._first)
        return self._first + ([Fault("", f"and {rest} more fault{'s' if rest > 1 else ''}")] if rest else [])


class RecordError(ValueError):
    """A file that cannot be read or written as a record: `file: place: what is there, what was expected`."""

    def __init__(self, path: str | os.PathLike[str], fault: Fault) -> None:
        self.path = os.fspath(path)
        shown = self.path if self.path and self.path.isprintable() else repr(self.path)
        super().__init__(f"{shown}: {fault}")
        self.fault = fault

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, Fault]]:
        return RecordError, (self.path, self.fault)


def shown(value: object) -> str:
    """The value as Python writes it, on one line and shortened, however large it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe(error: OSError) -> str:
    """The system's words for what went wrong, without the path, which RecordError puts in front."""
    return error.strerror or type(error).__name__


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of the file at `path`. Raises RecordError when there is no plain file.

    To be asked before opening: opening a pipe would wait for its writer.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path would read an empty text as the current folder
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error
    except ValueError as error:  # a null byte
        raise RecordError(path, Fault("", str(error))) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no plain file"
        raise RecordError(path, Fault("", f"{kind}, expected a file"))
    return status.st_size
