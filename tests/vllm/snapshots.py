"""What the workers say of themselves (`eplb_snapshot`), read for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.vllm.engine import Engine

PATIENCE_S = 300.0


def of_ranks(engine: Engine) -> list[dict[str, Any]]:
    """One snapshot for each worker."""
    return engine.rpc("eplb_snapshot")


def statuses(engine: Engine) -> list[dict[str, Any]]:
    """The balancer of the only model, of each worker."""
    found = []
    for snapshot in of_ranks(engine):
        (status,) = snapshot["models"].values()
        found.append(status)
    return found


def layouts(engine: Engine) -> list[list[list[int]]]:
    """physical_to_logical [layers, physical] by which each worker's router works: vLLM's own table."""
    found = []
    for tables in engine.rpc("probe_physical_to_logical"):
        (table,) = tables
        found.append(table)
    return found


def serve_until(
    engine: Engine, is_enough: Callable[[dict[str, Any]], bool], serve: Callable[[], None]
) -> None:
    """Serve again and again until it is enough for every worker by its status: in how many passes a cycle
    ends is up to the machine, and cycles end only while forward passes do.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        serve()
        found = statuses(engine)
        if all(map(is_enough, found)):
            return
        assert time.monotonic() < deadline, found


def serve_until_idle(engine: Engine, prompts: list[list[int]]) -> None:
    """Let the cycle that is under way come to its end; a paused engine begins no other."""
    if not all(map(is_idle, statuses(engine))):
        serve_until(engine, is_idle, lambda: engine.generate(prompts, 4))


def is_idle(status: dict[str, Any]) -> bool:
    return status["state"] in ("idle", "paused")
