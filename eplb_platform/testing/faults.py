"""Faults injected into a backend, so that tests see what the balancer does about them."""

from __future__ import annotations

import time
from typing import TypeVar

from eplb_platform.backend import Backend

AnyBackend = TypeVar("AnyBackend", bound=Backend)


def with_fault(
    backend: AnyBackend,
    method: str,
    *,
    call: int | None = 1,
    error: Exception | None = None,
    delay_s: float = 0.0,
    drop: bool = False,
) -> AnyBackend:
    """Make the `call`-th call of `backend.<method>` go wrong, counted from 1 and from now; None: every call.

    At that call: sleep `delay_s` seconds, then raise `error` if there is one, then do nothing if `drop`, else
    what the method does. Other calls are untouched. Returns the same backend; faults add up.
    """
    original = getattr(backend, method, None)
    if not callable(original):
        raise ValueError(f"{type(backend).__name__} has no method {method!r}")
    calls = 0

    def faulty(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if call is not None and calls != call:
            return original(*args, **options)
        time.sleep(delay_s)
        if error is not None:
            raise error
        return None if drop else original(*args, **options)

    setattr(backend, method, faulty)
    return backend
