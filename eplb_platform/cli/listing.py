"""The list of backends; what vendors' libraries print while it is made does not get into it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from threading import Timer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eplb_platform.backend import BackendReport

_OUT, _ERR = 1, 2
_SLOW_S = 15.0


def examine_backends() -> list[BackendReport]:
    """As `discover_backends`. What is printed meanwhile, by C code too, goes to standard error.

    A backend that takes long is named there, so that one that never ends is known.
    """
    from eplb_platform.backend import discover_backends

    with redirect_stdout(sys.stderr), _descriptor_redirected(), _slow_ones_named() as watch:
        return discover_backends(watch)


@contextmanager
def _slow_ones_named() -> Iterator[Callable[[str], None]]:
    """Gives a function to be called whenever the next one begins."""
    timers: list[Timer] = []

    def watch(name: str) -> None:
        line = f"backend {name!r} is still being imported after {_SLOW_S:g} s"
        stop()
        timers.append(Timer(_SLOW_S, print, (line,), {"file": sys.stderr}))
        timers[-1].daemon = True
        timers[-1].start()

    def stop() -> None:
        if timers:
            timers.pop().cancel()

    try:
        yield watch
    finally:
        stop()


@contextmanager
def _descriptor_redirected() -> Iterator[None]:
    sys.stdout.flush()
    try:
        kept = os.dup(_OUT)
        os.dup2(_ERR, _OUT)
    except OSError:  # one of them is closed
        yield
        return
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, _OUT)
        os.close(kept)
