"""Whether torch_npu, CANN and a device are there, and what to do if not.

torch_npu is imported only once everything that it needs was found: its import stops half-way otherwise, after
it has changed parts of torch.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_DEFAULT_HOMES = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")
_LIBRARY = "libhccl.so"
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class Unavailable(Exception):
    """Something is missing; the text says what, and what to do, in one line."""


def torch_npu() -> ModuleType:
    """torch_npu, imported whether torch has loaded it by itself or not. Raises `Unavailable`."""
    _check_versions()
    _check_cann()
    autoload = os.environ.get(_AUTOLOAD)
    try:
        return importlib.import_module("torch_npu")
    except (Exception, SystemExit) as error:
        raise Unavailable(
            f"torch_npu {_installed()} fails to import: {_one_line(error)}{_import_advice(error)}"
        ) from error
    finally:  # torch_npu turns the switch off, and leaves it so when it fails
        if autoload is None:
            os.environ.pop(_AUTOLOAD, None)
        else:
            os.environ[_AUTOLOAD] = autoload


def count_devices() -> int:
    """NPUs that this process may use; never 0. Raises `Unavailable`."""
    module = torch_npu()
    try:
        count = int(module.npu.device_count())
    except (Exception, SystemExit) as error:
        raise Unavailable(f"torch_npu cannot count the devices: {_one_line(error)}") from error
    if count == 0:
        raise Unavailable("torch_npu sees no NPU: check npu-smi info and ASCEND_RT_VISIBLE_DEVICES")
    return count


def versions() -> dict[str, str]:
    """Of torch, torch_npu and CANN, as far as they can be found. Imports nothing."""
    home = cann_home()
    found = {"torch": str(torch.__version__), "torch_npu": _installed(), "cann": home and _cann_version(home)}
    return {name: version for name, version in found.items() if version}


def cann_home(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of CANN that set_env.sh has named, or else the usual one; None if there is none."""
    named = [environment[name] for name in _HOMES if environment.get(name)]
    for home in named or _DEFAULT_HOMES:
        if Path(home).is_dir():
            return Path(home)
    return None


def _check_versions() -> None:
    try:
        is_there = find_spec("torch_npu") is not None
    except (ImportError, ValueError):  # a module without a spec was put in its place
        is_there = True
    needed = _release(str(torch.__version__))
    if not is_there:
        raise Unavailable(f"torch_npu is not installed: pip install torch_npu=={needed}")
    installed = _installed()
    if installed and _release(installed) != needed:
        raise Unavailable(
            f"torch_npu {installed} does not fit torch {torch.__version__}: pip install torch_npu=={needed}, "
            f"or torch=={_release(installed)}"
        )


def _check_cann() -> None:
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise Unavailable(f"CANN cannot be loaded ({_one_line(error)}): {_advice()}") from error


def _advice() -> str:
    for name in _HOMES:
        if os.environ.get(name) and not Path(os.environ[name]).is_dir():
            return f"{name} is {os.environ[name]}, which is no folder: source the set_env.sh of CANN"
    home = cann_home()
    if home is None:
        return f"{' and '.join(_HOMES)} are not set: install CANN and source its set_env.sh"
    if not any(home.glob(f"**/lib64/{_LIBRARY}")):
        return f"{home} has no lib64/{_LIBRARY}: install the toolkit of CANN"
    return f"source {home}/set_env.sh, and check that the driver is installed"


def _import_advice(error: BaseException) -> str:
    if "undefined symbol" in str(error):
        cann = versions().get("cann", "that is found")
        return f": the CANN {cann} lacks it, install the one that torch_npu {_installed()} was made for"
    return f": {_advice()}" if "cannot open shared object file" in str(error) else ""


def _cann_version(home: Path) -> str | None:
    """From the toolkit's own files: `version=8.2.RC1` or `Version=8.2.RC1`."""
    names = ("ascend_toolkit_install.info", "version.info", "version.cfg")
    for path in (path for name in names for folder in ("", "*-linux/") for path in home.glob(folder + name)):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found = re.search(r"(?im)^(?:runtime_running_)?version\s*=\s*\[?\s*(?:[\d.]+:)?([\w.+-]+)", text)
        if found:
            return found.group(1)
    return None


def _installed() -> str:
    """The version of the torch_npu that is installed; empty if nothing says so."""
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> str:
    """`2.13.0` of `2.13.0+cpu` or `2.13.0.post1`: what torch and torch_npu have to agree on."""
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return found.group() if found else version


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
