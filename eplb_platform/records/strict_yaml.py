"""YAML of plain mappings, lists and scalars, read with bounded effort."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from eplb_platform.records.fault import Fault, RecordError, describe, file_size, shown

MAX_FILE_BYTES = 1 << 26
MAX_VALUES = 1 << 20
"""Scalars, lists and mappings: each takes about a kilobyte while it is read."""
_MAX_DEPTH = 16
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _RepeatedKeyError(ValueError):
    """A mapping has a key twice."""


class _Loader(_BASE):  # type: ignore[misc]  # which of the two it is depends on how PyYAML was built
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise _RepeatedKeyError(f"line {node.start_mark.line + 1}")
        return found


def read(path: str | os.PathLike[str]) -> object:
    """The YAML document in the file at `path`.

    Raises RecordError for what is no YAML, aliases (which can make a small file vast), a key given twice,
    deep nesting, and numbers of thousands of digits.
    """
    size = file_size(path)
    if size > MAX_FILE_BYTES:
        raise RecordError(path, Fault("", f"{size} bytes, expected at most {MAX_FILE_BYTES}"))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RecordError(path, Fault("", describe(error))) from error
    try:
        _check_events(path, content)
        return yaml.load(content, Loader=_Loader)
    except RecordError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"
        message = f"no valid YAML: {error.problem}"
    except _RepeatedKeyError as error:
        place, message = str(error), "a key stands more than once in this mapping"
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        place, message = "", f"no valid YAML: {shown(str(error))}"
    raise RecordError(path, Fault(place, message))


def _check_events(path: str | os.PathLike[str], content: bytes) -> None:
    """Refuse, before anything is built, what could make building it endless."""
    depth = 0
    for number, event in enumerate(yaml.parse(content, Loader=_Loader)):
        if number > MAX_VALUES:
            raise RecordError(path, Fault("", f"more than {MAX_VALUES} values"))
        line = f"line {event.start_mark.line + 1}" if event.start_mark else ""
        if isinstance(event, yaml.AliasEvent):
            raise RecordError(path, Fault(line, "an alias, expected none"))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise RecordError(path, Fault(line, "nested too deeply"))
