"""vLLM's physical-to-logical map as JSON: a list for each MoE layer, of the logical expert in each slot.

    [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]

The layout of vLLM's own table and of the initial map that its pull request 49572 proposes to read. Released
engines have no option that takes it: with this project's plugin they take an expert-map JSON. The file does
not say how many ranks share the slots.
"""

from __future__ import annotations

import os

from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import physical_table, strict_json
from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, Faults, shown
from eplb_platform.topology import Topology

MAX_FAULTS = 100


def read(
    path: str | os.PathLike[str],
    *,
    num_logical_experts: int | None = None,
    topology: Topology | None = None,
) -> ExpertMap:
    """The map in the file at `path`.

    num_logical_experts: by default what the file holds
    topology: the ranks that share the slots; needed, because the file does not say it

    Raises RecordError with the first fault and the number of the others; see `faults`.
    """
    return physical_table.read(
        path, lambda found: _check(strict_json.read(path), found, num_logical_experts, topology)
    )


def write(path: str | os.PathLike[str], expert_map: ExpertMap) -> None:
    """Write the map to `path`, atomically; folders that are missing are made.

    Raises RecordError when the file cannot be written, and for a map with inactive ranks.
    """
    rows = ",\n".join(map(str, physical_table.rows_of(path, expert_map)))
    write_record(path, f"[\n{rows}\n]\n".encode())


def faults(
    path: str | os.PathLike[str],
    *,
    num_logical_experts: int | None = None,
    topology: Topology | None = None,
    limit: int = MAX_FAULTS,
) -> list[Fault]:
    """Everything that is wrong with the file at `path`; an empty list for a valid map.

    num_logical_experts, topology: what the file must fit; limit: faults listed, one more counts the rest
    """
    return physical_table.faults(
        lambda found: _check(strict_json.read(path), found, num_logical_experts, topology), limit
    )


def _check(
    document: object, found: Faults, num_logical_experts: int | None, topology: Topology | None
) -> ExpertMap | None:
    if not isinstance(document, list) or not document:
        found.add("", f"{shown(document)}, expected a list of experts for each layer")
        return None
    if type(document[0]) is int:
        found.add("", "one list for all layers, which does not say how many, expected a list for each layer")
        return None
    return physical_table.check(document, lambda row: f"[{row}]", found, num_logical_experts, topology)
