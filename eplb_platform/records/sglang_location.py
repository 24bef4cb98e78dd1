"""SGLang's `--init-expert-location`: a map as .json, or as .pt with a tensor.

    {"physical_to_logical_map": [[0, 1, 2, ...], ...]}

A row for each hidden layer of the model, dense ones included; an ExpertMap has only the MoE layers, so
`first_moe_layer` says how many rows stand in front of them. The engine refuses further keys, and the file
does not say how many ranks share the slots. (A file with `logical_count` holds load: see sglang_recorder.)
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import physical_table, strict_json, torch_file
from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, Faults, RecordError, shown
from eplb_platform.topology import Topology

KEY = "physical_to_logical_map"
SUFFIXES = (".json", ".pt")
MAX_FAULTS = 100


def read(
    path: str | os.PathLike[str],
    *,
    num_logical_experts: int | None = None,
    topology: Topology | None = None,
    first_moe_layer: int = 0,
) -> ExpertMap:
    """The map in the file at `path`.

    num_logical_experts: by default what the file holds
    topology: the ranks that share the slots; needed, because the file does not say it
    first_moe_layer: dense layers of the model, whose rows are left out

    Raises RecordError with the first fault and the number of the others; see `faults`.
    """
    return physical_table.read(
        path, lambda found: _check(_document(path), found, num_logical_experts, topology, first_moe_layer)
    )


def write(path: str | os.PathLike[str], expert_map: ExpertMap, *, first_moe_layer: int = 0) -> None:
    """Write the map to `path`, atomically; folders that are missing are made.

    first_moe_layer: dense layers of the model, which get the layout that the engine starts with

    Raises RecordError for another suffix than .json and .pt, when the file cannot be written, and for a map
    with inactive ranks.
    """
    suffix = _suffix(path)
    rows = physical_table.rows_of(path, expert_map)
    rows = physical_table.trivial_rows(expert_map, first_moe_layer) + rows
    if suffix == ".pt":
        import torch

        torch_file.write(path, {KEY: torch.tensor(rows)})
        return
    write_record(path, f"{json.dumps({KEY: rows})}\n".encode())


def faults(
    path: str | os.PathLike[str],
    *,
    num_logical_experts: int | None = None,
    topology: Topology | None = None,
    first_moe_layer: int = 0,
    limit: int = MAX_FAULTS,
) -> list[Fault]:
    """Everything that is wrong with the file at `path`; an empty list for a valid map.

    num_logical_experts, topology: what the file must fit; limit: faults listed, one more counts the rest
    """
    return physical_table.faults(
        lambda found: _check(_document(path), found, num_logical_experts, topology, first_moe_layer), limit
    )


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(path, Fault("", f"suffix {suffix!r}, expected {' or '.join(SUFFIXES)}"))
    return suffix


def _document(path: str | os.PathLike[str]) -> object:
    return torch_file.read(path) if _suffix(path) == ".pt" else strict_json.read(path)


def _check(
    document: object,
    found: Faults,
    num_logical_experts: int | None,
    topology: Topology | None,
    first_moe_layer: int,
) -> ExpertMap | None:
    if not isinstance(document, dict) or KEY not in document:
        found.add(KEY, f"missing in {shown(document)}, expected a list of experts for each layer")
        return None
    if isinstance(document, strict_json.RepeatedKeys):
        found.add("", f"the key {shown(document.keys_given_twice[0])} stands more than once")
    for key in document:
        if key != KEY:
            found.add(shown(key), f"an unknown key, expected only {KEY}: the engine would refuse it")
    rows = _rows(document[KEY])
    if not isinstance(rows, list) or len(rows) <= first_moe_layer:
        count = f"{len(rows)} layers" if isinstance(rows, list) else shown(rows)
        found.add(KEY, f"{count}, expected rows for more than {first_moe_layer} layers")
        return None
    return physical_table.check(
        rows[first_moe_layer:],
        lambda row: f"{KEY}[{first_moe_layer + row}]",
        found,
        num_logical_experts,
        topology,
    )


def _rows(value: object) -> object:
    """A tensor as lists; anything else as it is."""
    if isinstance(value, list):
        return value
    import torch

    if isinstance(value, torch.Tensor):
        if value.numel() > physical_table.MAX_ENTRIES or value.dim() != 2 or value.is_floating_point():
            return f"{value.dtype} {list(value.shape)}"
        if value.layout is torch.strided and value.device.type == "cpu":
            return value.tolist()
    return f"{type(value).__name__}"
