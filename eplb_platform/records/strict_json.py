"""JSON as its standard has it, read with bounded effort."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TypeAlias

from eplb_platform.records.fault import Fault, RecordError, describe, file_size

MAX_FILE_BYTES = 1 << 28
MAX_CONTAINERS = 1 << 21
MAX_VALUES = 1 << 24
"""Lists and objects, and what stands in them: each takes many times the bytes that it has in the file."""

Object: TypeAlias = dict[str, object]


class RepeatedKeys(Object):
    """A JSON object that has some keys more than once; it holds the last values."""

    keys_given_twice: list[str]


def read(path: str | os.PathLike[str]) -> object:
    """The JSON document in the file at `path`; see `parse`. Raises RecordError when there is none."""
    size = file_size(path)
    if size > MAX_FILE_BYTES:
        raise RecordError(path, Fault("", f"{size} bytes, expected at most {MAX_FILE_BYTES}"))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error
    return parse(path, content)


def parse(path: str | os.PathLike[str], content: bytes) -> object:
    """The JSON document that `content`, read from `path`, is; an object with a key twice is a RepeatedKeys.

    Raises RecordError for what is no UTF-8 text or no JSON, for NaN and Infinity, which Python would
    read, for deep nesting, for numbers of thousands of digits, and for more values than memory may be taken
    for.
    """
    for what, limit, count in (
        ("lists and objects", MAX_CONTAINERS, content.count(b"[") + content.count(b"{")),
        ("values", MAX_VALUES, content.count(b",")),
    ):
        if count > limit:
            raise RecordError(path, Fault("", f"{count} {what}, expected at most {limit}"))
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        place, message = f"byte {error.start}", f"no UTF-8 text: {error.reason}"
    except json.JSONDecodeError as error:
        place, message = f"line {error.lineno}, column {error.colno}", f"no valid JSON: {error.msg}"
    except _ConstantError as error:
        place, message = "", f"no valid JSON: {error} is no value"
    except RecursionError:
        place, message = "", "nested too deeply"
    except ValueError:  # Python's own limit, which keeps the conversion from taking for ever
        place, message = "", "a number has too many digits"
    raise RecordError(path, Fault(place, message))


class _ConstantError(ValueError):
    """NaN or Infinity."""


def _refuse_constant(name: str) -> object:
    raise _ConstantError(name)


def _object(pairs: list[tuple[str, object]]) -> Object:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    repeated = RepeatedKeys(plain)
    repeated.keys_given_twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    return repeated
