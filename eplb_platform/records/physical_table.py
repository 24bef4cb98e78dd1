"""Rows of logical experts, one for each layer: what the files of several engines come down to.

Such a file does not say how many ranks share the slots; the topology does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.records.fault import Fault, Faults, RecordError, shown
from eplb_platform.topology import Topology

# Layers times slots: far above any model, and a bound on the memory that a small file can ask for.
MAX_ENTRIES = 1 << 24
NO_RANKS = "the file does not say how many ranks share the slots: give the topology (--ep-size)"


def check(
    rows: Sequence[object],
    place_of: Callable[[int], str],
    found: Faults,
    num_logical_experts: int | None,
    topology: Topology | None,
) -> ExpertMap | None:
    """The map that the rows are, or None with what is wrong in `found`.

    rows: for each layer a list of the logical experts in its slots
    place_of: names the row of a layer in the file
    num_logical_experts: by default one more than the largest id
    """
    table = _table(rows, place_of, found)
    if table is None:
        return None
    num_experts = int(table.max()) + 1 if num_logical_experts is None else num_logical_experts
    _check_ids(table, num_experts, place_of, found)
    if topology is None:
        found.add("", NO_RANKS)
    elif table.shape[1] % topology.num_ranks:
        found.add(place_of(0), f"{table.shape[1]} slots, expected a multiple of {topology.num_ranks} ranks")
    elif topology.num_active_ranks < topology.num_ranks:
        found.add("", "this format has no inactive ranks, expected a topology without them")
    if found or topology is None:
        return None
    return ExpertMap(table, num_experts, topology)


def rows_of(path: str | os.PathLike[str], expert_map: ExpertMap) -> list[list[int]]:
    """The experts in the slots of each layer. Raises RecordError for a map with inactive ranks."""
    if expert_map.topology.num_active_ranks < expert_map.topology.num_ranks:
        raise RecordError(path, Fault("", "the map has inactive ranks, which this format cannot hold"))
    rows: list[list[int]] = expert_map.physical_to_logical.tolist()
    return rows


def trivial_rows(expert_map: ExpertMap, count: int) -> list[list[int]]:
    """The layout that engines start with, for layers without experts in front of those of the map."""
    experts = np.arange(expert_map.num_physical_experts) % expert_map.num_logical_experts
    return [experts.tolist() for _ in range(count)]


def read(path: str | os.PathLike[str], check_file: Callable[[Faults], ExpertMap | None]) -> ExpertMap:
    """The map that `check_file` finds in the file at `path`; RecordError with the first fault and the number
    of the others where it finds none.
    """
    found = Faults(limit=1)
    expert_map = check_file(found)
    if expert_map is not None:
        return expert_map
    fault, *rest = found.listed()
    more = f" ({rest[0].message})" if rest else ""
    raise RecordError(path, Fault(fault.place, fault.message + more))


def faults(check_file: Callable[[Faults], object], limit: int) -> list[Fault]:
    """Everything that `check_file` finds; a RecordError that it raises is the only fault."""
    found = Faults(limit)
    try:
        check_file(found)
    except RecordError as error:
        return [error.fault]
    return found.listed()


def _table(rows: Sequence[object], place_of: Callable[[int], str], found: Faults) -> NDArray[np.int64] | None:
    """[layers, slots], if the rows are lists of integers of one length."""
    lists: list[list[object]] = []
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or not row:
            found.add(place_of(layer), f"{shown(row)}, expected a list of experts")
        else:
            lists.append(row)
            if len(row) != len(lists[0]):
                found.add(place_of(layer), f"{len(row)} slots, expected {len(lists[0])} as in others")
    if len(lists) == len(rows) and sum(map(len, lists)) > MAX_ENTRIES:
        found.add("", f"{sum(map(len, lists))} slots in all layers, expected at most {MAX_ENTRIES}")
    if found or not lists:
        return None
    for layer, row in enumerate(lists):
        if set(map(type, row)) != {int}:  # true is an int for isinstance
            slot = next(i for i, value in enumerate(row) if type(value) is not int)
            found.add(f"{place_of(layer)}[{slot}]", f"{shown(row[slot])}, expected the id of an expert")
    if found:
        return None
    try:
        return np.array(lists, dtype=np.int64)
    except OverflowError:
        found.add("", "an id has too many digits, expected ids of experts")
        return None


def _check_ids(
    table: NDArray[np.int64], num_experts: int, place_of: Callable[[int], str], found: Faults
) -> None:
    """Ids in range, and every expert in every layer."""
    if not 0 < num_experts <= table.shape[1]:
        layer, slot = divmod(int(table.argmax()), table.shape[1])
        found.add(
            f"{place_of(layer)}[{slot}]",
            f"{num_experts} experts, expected at most the {table.shape[1]} slots of a layer",
        )
        return
    wrong = np.argwhere((table < 0) | (table >= num_experts))

    def misplaced(number: int) -> tuple[str, str]:
        layer, slot = wrong[number]
        message = f"{table[layer, slot]}, expected an expert from 0 to {num_experts - 1}"
        return f"{place_of(int(layer))}[{slot}]", message

    found.add_all(len(wrong), misplaced)
    sound = set(range(len(table))) - set(wrong[:, 0].tolist())
    for layer in sorted(sound):
        held = np.bincount(table[layer], minlength=num_experts) > 0
        if not held.all():
            missing = np.flatnonzero(~held).tolist()
            names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            found.add(place_of(layer), f"no slot holds expert {names}, expected every expert")
