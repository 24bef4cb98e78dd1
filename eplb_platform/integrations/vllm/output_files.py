"""The files that serving is to write: whether they can be written, found out before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from eplb_platform.config import SECTION, ConfigError, EplbConfig


def check_distinct(config: EplbConfig) -> None:
    """Raise ConfigError when one of the files would overwrite another of another kind.

    The map may be read from the file that it is recorded to: the next start goes on from there.
    """
    for written in ("trace_record_path", "compute_cost_record_path"):
        for other in ("expert_map_path", "expert_map_record_path", "trace_record_path"):
            path, taken = getattr(config, written), getattr(config, other)
            if written == other or path is None or taken is None:
                continue
            if os.path.realpath(path) == os.path.realpath(taken):
                raise ConfigError(
                    f"{SECTION}.{written}: {path!r} is the same file as "
                    f"{SECTION}.{other}, expected another one"
                )


def check_writable(config: EplbConfig) -> None:
    """Raise ConfigError for a record path that cannot be written."""
    for key in ("expert_map_record_path", "trace_record_path", "compute_cost_record_path"):
        path = getattr(config, key)
        if path is None:
            continue
        given = f"{SECTION}.{key}: {path!r}"
        try:
            fault = _fault(Path(os.path.realpath(path)))
        except OSError as error:
            raise ConfigError(f"{given} cannot be written ({error.strerror or error})") from error
        if fault is not None:
            raise ConfigError(f"{given}{fault}")


def _fault(target: Path) -> str | None:
    """What stands in the way of replacing the file `target`; OSError for what only trying could tell."""
    if target.is_dir():
        return " is a folder, expected a file"
    if target.exists() and not target.is_file():
        return " is no ordinary file"
    folder = target.parent
    if not folder.exists():
        return f": the folder {str(folder)!r} does not exist"
    if not folder.is_dir():
        return f": {str(folder)!r} is not a folder"
    # A mode says nothing of a read-only file system, or of a superuser.
    with TemporaryFile(dir=folder, prefix="."):
        return None
