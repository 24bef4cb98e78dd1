"""The one decorator that every compiled kernel wears.

Import it only from modules that hold kernels: importing numba takes a third of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for its argument types on first call, to run without the interpreter lock.

    One thread and no fast-math: the same input gives the same bits on every machine and thread count.
    The compiled code is kept on disk where that is possible (beside the source or in the user's cache).
    """
    try:
        compiled: Callable[P, R] = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # numba refuses a cache when neither folder can be written, as in a read-only container.
        compiled = numba.njit(nogil=True)(function)
    return compiled
