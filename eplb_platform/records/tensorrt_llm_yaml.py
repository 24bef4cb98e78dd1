"""TensorRT-LLM's moe_load_balancer.yaml: a static placement for `moe_config.load_balancer`.

    initial_global_assignments:
      3: [138, 81, 60, ...]      the logical expert in each slot of MoE layer 3
    num_slots: 288
    layer_updates_per_iter: 0

Keys are the numbers of the model's layers, so they start after its dense ones; an ExpertMap has only the MoE
layers, in order. The engine refuses further keys. The file does not say the EP size, unless it has the
`ep_size` that early releases wrote.
"""

from __future__ import annotations

import os

from eplb_platform.expert_map import ExpertMap
from eplb_platform.limits import MOST_RANKS
from eplb_platform.records import physical_table, strict_yaml
from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, Faults, shown
from eplb_platform.topology import Topology

MAX_FAULTS = 100
_ASSIGNMENTS = "initial_global_assignments"
_UPDATES = "layer_updates_per_iter"
_KEYS = {_ASSIGNMENTS, "num_slots", _UPDATES, "ep_size"}


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
        path, lambda found: _check(strict_yaml.read(path), found, num_logical_experts, topology)
    )


def write(path: str | os.PathLike[str], expert_map: ExpertMap, *, first_moe_layer: int = 0) -> None:
    """Write the map to `path`, atomically; folders that are missing are made.

    first_moe_layer: the number of the model's first layer with experts

    Raises RecordError when the file cannot be written, and for a map with inactive ranks.
    """
    rows = physical_table.rows_of(path, expert_map)
    lines = [f"  {first_moe_layer + i}: {row}" for i, row in enumerate(rows)]
    text = "\n".join(
        [f"{_ASSIGNMENTS}:", *lines, f"num_slots: {expert_map.num_physical_experts}", f"{_UPDATES}: 0", ""]
    )
    write_record(path, text.encode())


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
        lambda found: _check(strict_yaml.read(path), found, num_logical_experts, topology), limit
    )


def _check(
    document: object, found: Faults, num_logical_experts: int | None, topology: Topology | None
) -> ExpertMap | None:
    if not isinstance(document, dict):
        found.add("", f"{shown(document)}, expected a mapping with {_ASSIGNMENTS} and num_slots")
        return None
    for key in document:
        if key not in _KEYS:
            found.add(shown(key), f"an unknown key, expected only {', '.join(sorted(_KEYS))}")
    updates = document.get(_UPDATES, 0)
    if type(updates) is not int or updates < 0:
        found.add(_UPDATES, f"{shown(updates)}, expected an integer of at least 0")
    assignments = document.get(_ASSIGNMENTS)
    if not isinstance(assignments, dict) or not assignments:
        given = shown(assignments) if _ASSIGNMENTS in document else "missing (a configuration without a map)"
        found.add(_ASSIGNMENTS, f"{given}, expected a list of experts for each layer")
        return None
    layers = [key for key in assignments if type(key) is int and key >= 0]
    for key in assignments:
        if type(key) is not int or key < 0:
            found.add(f"{_ASSIGNMENTS}.{shown(key)}", "expected the number of a layer")
    layers.sort()
    _check_slots(document, [assignments[layer] for layer in layers], layers, found)
    return physical_table.check(
        [assignments[layer] for layer in layers],
        lambda row: f"{_ASSIGNMENTS}.{layers[row]}",
        found,
        num_logical_experts,
        _topology(document, topology, found),
    )


def _check_slots(
    document: dict[object, object], rows: list[object], layers: list[int], found: Faults
) -> None:
    slots = document.get("num_slots")
    if type(slots) is not int or slots < 1:
        given = shown(slots) if "num_slots" in document else "missing"
        found.add("num_slots", f"{given}, expected an integer of at least 1")
        return
    for layer, row in zip(layers, rows, strict=True):
        if isinstance(row, list) and len(row) != slots:
            found.add(f"{_ASSIGNMENTS}.{layer}", f"{len(row)} slots, expected num_slots ({slots})")


def _topology(document: dict[object, object], topology: Topology | None, found: Faults) -> Topology | None:
    """What was asked for, or what an early release wrote."""
    if "ep_size" not in document:
        return topology
    ranks = document["ep_size"]
    if type(ranks) is not int or not 0 < ranks <= MOST_RANKS:
        found.add("ep_size", f"{shown(ranks)}, expected an integer of at least 1, at most {MOST_RANKS}")
        return topology
    if topology is not None and topology.num_ranks != ranks:
        found.add("ep_size", f"{ranks}, expected {topology.num_ranks} ranks")
    return topology or Topology(ranks)
