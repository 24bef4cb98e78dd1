"""Torch's first import in a process, made so that a broken device extension takes nothing else with it."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import entry_points

_log = logging.getLogger(__name__)

_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_GROUP = "torch.backends"


def import_torch() -> None:
    """Import torch and, unless their auto-load is switched off, the extensions for devices out of its tree.

    `import torch` fails with the first extension that does, and torch cannot be imported again in that
    process. Here the others are loaded all the same, one log line says which failed, and processes started
    later do not try again. Does nothing where torch is imported already.
    """
    if "torch" in sys.modules:
        return
    given = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "0"
    try:
        import torch  # noqa: F401
    finally:
        _set_switch(given)
    if given not in (None, "1"):
        return
    for extension in entry_points(group=_GROUP):
        try:
            extension.load()()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _log.warning("torch extension %s is not loaded: %s", extension.name, _one_line(error))
            given = "0"
        _set_switch(given)  # an extension may have changed it


def _set_switch(value: str | None) -> None:
    if value is None:
        os.environ.pop(_SWITCH, None)
    else:
        os.environ[_SWITCH] = value


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
