"""What the workers say of themselves (`eplb_snapshot`), read for tests."""

from __future__ import annotations

from typing import Any

from tests.vllm.engine import Engine


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
