"""The list of backends; what vendors' libraries print while it is made does not get into it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eplb_platform.backend import BackendReport

_OUT, _ERR = 1, 2


def examine_backends() -> list[BackendReport]:
    """As `discover_backends`. What is printed meanwhile, by C code too, goes to standard error."""
    from eplb_platform.backend import discover_backends

    with redirect_stdout(sys.stderr), _descriptor_redirected():
        return discover_backends()


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
