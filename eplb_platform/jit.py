"""The one decorator that every compiled kernel wears.

Import it only from modules that hold kernels: importing numba takes a third of a second.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for its argument types on first call, to run without the interpreter lock.

    One thread and no fast-math: the same input gives the same bits on every machine and thread count.
    The compiled code is kept on disk where that is possible (beside the source or in the user's cache), until
    its module changes, or another whose kernels it calls.
    """
    try:
        called = sorted(_modules_called(function, set()))
        if called:
            # numba looks at a kernel's file and name only, though its compiled code holds all that it calls.
            digest = hashlib.sha256("".join(map(_digest, called)).encode()).hexdigest()
            function.__qualname__ += f"_{digest[:16]}"
        compiled: Callable[P, R] = numba.njit(nogil=True, cache=True)(function)
    except (RuntimeError, OSError):
        # numba refuses a cache when neither folder can be written, as in a read-only container. Nothing is
        # kept of an installation without sources.
        compiled = numba.njit(nogil=True)(function)
    return compiled


def _modules_called(function: Callable[..., object], known: set[str]) -> set[str]:
    """`known` and the modules, `function`'s own apart, whose kernels its module has, and theirs in turn."""
    for value in function.__globals__.values():
        called = getattr(value, "py_func", None)
        if called is not None and called.__module__ not in known | {function.__module__}:
            known.add(called.__module__)
            _modules_called(called, known)
    return known


@cache
def _digest(module: str) -> str:
    return hashlib.sha256(inspect.getsource(sys.modules[module]).encode()).hexdigest()
