"""The expert map as JSON, vllm-ascend's format.

    {"moe_layer_count": L, "layer_list": [{"layer_id": i, "device_count": R, "device_list": [
        {"device_id": r, "device_expert": [logical id for each slot]}]}]}

Layers and devices may stand in any order, and further keys are ignored. The physical expert of slot i on
device r is r * slots + i. The redundancy, and without further knowledge the number of logical experts, is
what the file says; nodes are not in it. Slots of inactive ranks are -1: such a file is read with its
topology only.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.limits import MOST_RANKS
from eplb_platform.records import strict_json
from eplb_platform.records.atomic import write_record
from eplb_platform.records.fault import Fault, Faults, RecordError, shown
from eplb_platform.topology import Topology

MAX_FAULTS = 100
_LARGEST_ID = 2**31 - 1

_Object: TypeAlias = dict[str, object]


def read(
    path: str | os.PathLike[str],
    *,
    num_logical_experts: int | None = None,
    topology: Topology | None = None,
) -> ExpertMap:
    """The map in the file at `path`.

    num_logical_experts, topology: what the file must fit; by default what it says, on one node

    Raises RecordError with the first fault and the number of the others; see `faults`.
    """
    found = Faults(limit=1)
    experts = _check(strict_json.read(path), found, num_logical_experts, topology)
    if experts is None:
        fault, *rest = found.listed()
        more = f" ({rest[0].message})" if rest else ""
        raise RecordError(path, Fault(fault.place, fault.message + more))
    layers, ranks, _ = experts.shape
    return ExpertMap(experts.reshape(layers, -1), int(experts.max()) + 1, topology or Topology(ranks))


def write(path: str | os.PathLike[str], expert_map: ExpertMap) -> None:
    """Write the map to `path`, atomically; folders that are missing are made. Raises RecordError."""
    layers = ",\n".join(_layer_text(i, ranks) for i, ranks in enumerate(expert_map.by_rank().tolist()))
    text = f'{{"moe_layer_count": {expert_map.num_layers}, "layer_list": [\n{layers}\n]}}\n'
    write_record(path, text.encode())


def faults(
    path: str | os.PathLike[str],
    *,
    num_logical_experts: int | None = None,
    topology: Topology | None = None,
    limit: int = MAX_FAULTS,
) -> list[Fault]:
    """Everything that is wrong with the file at `path`; an empty list for a valid map.

    num_logical_experts, topology: what the file must fit; by default what it says
    limit: faults listed; one more counts the rest

    A fault may hide others: what is no JSON has no layers, and experts are missed only in a layer that is
    otherwise in order.
    """
    found = Faults(limit)
    try:
        _check(strict_json.read(path), found, num_logical_experts, topology)
    except RecordError as error:
        return [error.fault]
    return found.listed()


def _layer_text(layer: int, ranks: list[list[int]]) -> str:
    devices = ",\n".join(
        f'    {{"device_id": {rank}, "device_expert": {experts}}}'  # a list of ints prints as JSON
        for rank, experts in enumerate(ranks)
    )
    return f'  {{"layer_id": {layer}, "device_count": {len(ranks)}, "device_list": [\n{devices}\n  ]}}'


@dataclass(frozen=True)
class _Entry:
    """An object in a list of the file."""

    place: str
    content: _Object


@dataclass(frozen=True)
class _Row:
    """The device_expert of one device, a list of integers."""

    place: str
    layer: int  # position in layer_list
    device_id: int | None  # None where the file has none that can be used
    experts: list[int]


def _check(
    document: object, found: Faults, num_logical_experts: int | None, topology: Topology | None
) -> NDArray[np.int64] | None:
    """[layers, ranks, slots], the experts in the document; or None, with what is wrong in `found`."""
    layers = _layers(document, found)
    device_lists = [_list(layer, "device_list", found) for layer in layers]
    num_ranks = _num_ranks(layers, device_lists, topology, found)
    layer_ids = _ids(layers, "layer_id", len(layers), found)
    rows = [
        row
        for i, (layer, devices) in enumerate(zip(layers, device_lists, strict=True))
        for row in _rows(layer, devices, i, num_ranks, found)
    ]
    _check_slots(rows, found)
    if rows:
        is_active = topology.is_active if topology and topology.num_ranks == num_ranks else None
        experts = _Experts.of(rows, len(layers), is_active)
        _check_experts(experts, layers, num_ranks, num_logical_experts, found)
    return None if found else _table(rows, layer_ids, num_ranks)


def _table(rows: list[_Row], layer_ids: list[int | None], num_ranks: int) -> NDArray[np.int64]:
    """[layers, ranks, slots], the experts of a file without a fault: every id is there, every row as long."""
    table = np.empty((len(layer_ids), num_ranks, len(rows[0].experts)), dtype=np.int64)
    layers = cast("list[int]", [layer_ids[row.layer] for row in rows])
    ranks = cast("list[int]", [row.device_id for row in rows])
    table[layers, ranks] = [row.experts for row in rows]
    return table


def _layers(document: object, found: Faults) -> list[_Entry]:
    if not isinstance(document, dict):
        found.add("", f"{shown(document)}, expected an object with moe_layer_count and layer_list")
        return []
    top = _Entry("", document)
    _check_keys(top, found)
    count = _integer(top, "moe_layer_count", found)
    layers = _list(top, "layer_list", found)
    if layers and count not in (None, len(layers)):
        found.add("moe_layer_count", f"{count}, but layer_list has {len(layers)} layers")
    return _objects(layers, "layer_list", found)


def _num_ranks(
    layers: list[_Entry], device_lists: list[list[object]], topology: Topology | None, found: Faults
) -> int:
    """The devices of a layer, as most layers have and declare them; other counts are faults."""
    counts = [len(devices) for devices in device_lists]
    declared = [layer.content.get("device_count") for layer in layers]
    num_ranks = _most_common([count for count in (*counts, *declared) if count in counts and count])
    if num_ranks > MOST_RANKS:
        found.add("layer_list", f"{num_ranks} devices in a layer, expected at most {MOST_RANKS}")
    if topology is not None and num_ranks not in (0, topology.num_ranks):
        found.add("layer_list", f"{num_ranks} devices in a layer, expected {topology.num_ranks} ranks")
    for layer, count in zip(layers, counts, strict=True):
        if count not in (0, num_ranks):
            message = f"{count} devices, expected {num_ranks} as in other layers"
            found.add(f"{layer.place}.device_list", message)
    return num_ranks


def _rows(
    layer: _Entry, device_list: list[object], position: int, num_ranks: int, found: Faults
) -> Iterator[_Row]:
    """The devices of a layer that have a list of integers."""
    count = _integer(layer, "device_count", found)
    if device_list and count not in (None, len(device_list)):
        message = f"{count}, but device_list has {len(device_list)} devices"
        found.add(f"{layer.place}.device_count", message)
    devices = _objects(device_list, f"{layer.place}.device_list", found)
    device_ids = _ids(devices, "device_id", num_ranks, found)
    for device, device_id in zip(devices, device_ids, strict=True):
        experts = _integers(_list(device, "device_expert", found), f"{device.place}.device_expert", found)
        if experts:
            yield _Row(f"{device.place}.device_expert", position, device_id, experts)


def _check_slots(rows: list[_Row], found: Faults) -> None:
    slots = _most_common([len(row.experts) for row in rows])
    for row in rows:
        if len(row.experts) != slots:
            found.add(row.place, f"{len(row.experts)} slots, expected {slots} as on other devices")


@dataclass(frozen=True)
class _Experts:
    """The experts of all rows, one after the other.

    ids: [slots], logical experts; row, slot: [slots], where each comes from
    layer: [slots], position in layer_list; is_active: [slots], whether the rank takes tokens
    """

    rows: list[_Row]
    num_layers: int
    ids: NDArray[np.int64]
    row: NDArray[np.int64]
    slot: NDArray[np.int64]
    layer: NDArray[np.int64]
    is_active: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: list[_Row], num_layers: int, is_active: NDArray[np.bool_] | None) -> _Experts:
        """is_active: [ranks], None when all are"""
        lengths = np.array([len(row.experts) for row in rows], dtype=np.int64)
        row = np.repeat(np.arange(len(rows)), lengths)
        active = [
            is_active is None or row.device_id is None or bool(is_active[row.device_id]) for row in rows
        ]
        return cls(
            rows=rows,
            num_layers=num_layers,
            ids=np.fromiter(chain.from_iterable(row.experts for row in rows), dtype=np.int64),
            row=row,
            slot=np.arange(row.size) - np.repeat(np.cumsum(lengths) - lengths, lengths),
            layer=np.array([row.layer for row in rows], dtype=np.int64)[row],
            is_active=np.array(active)[row],
        )

    def most_common_count(self, num_ranks: int) -> int:
        """Logical experts, as most of the complete layers have them."""
        slots = num_ranks * _most_common([len(row.experts) for row in self.rows])
        # An expert needs a slot, so an id that is not below the number of slots is a slip of the pen.
        plausible = self.ids < slots
        counts = np.zeros(self.num_layers, dtype=np.int64)
        np.maximum.at(counts, self.layer[plausible], self.ids[plausible] + 1)
        complete = self._rows_of_layer() == num_ranks
        # Of two counts that stand equally often the larger, which finds an expert that was left out.
        candidates = counts[complete] if complete.any() else counts[counts > 0]
        return _most_common(sorted(candidates.tolist(), reverse=True)) or slots

    def misplaced(self, num_experts: int) -> NDArray[np.intp]:
        """The positions of ids out of range, and of anything but -1 on an inactive rank."""
        out_of_range = (self.ids < 0) | (self.ids >= num_experts)
        return np.flatnonzero(np.where(self.is_active, out_of_range, self.ids != -1))

    def missing(self, num_experts: int, num_ranks: int) -> NDArray[np.bool_]:
        """[layers, experts], whether no device holds the expert; False in a layer with another fault."""
        sound = self._rows_of_layer() == num_ranks
        sound[self.layer[self.misplaced(num_experts)]] = False
        counted = sound[self.layer] & self.is_active
        held = np.zeros((self.num_layers, num_experts), dtype=np.bool_)
        held[self.layer[counted], self.ids[counted]] = True
        return np.asarray(~held & sound[:, None])

    def _rows_of_layer(self) -> NDArray[np.int64]:
        return np.bincount([row.layer for row in self.rows], minlength=self.num_layers)


def _check_experts(
    experts: _Experts, layers: list[_Entry], num_ranks: int, expected: int | None, found: Faults
) -> None:
    """Ids in range, -1 on inactive ranks and nowhere else, and no expert missing."""
    num_experts = experts.most_common_count(num_ranks)
    if expected is not None and expected != num_experts:
        if not experts.misplaced(num_experts).size and not experts.missing(num_experts, num_ranks).any():
            found.add("layer_list", f"{num_experts} logical experts in every layer, expected {expected}")
            return
        num_experts = expected
    misplaced = experts.misplaced(num_experts)
    missing = experts.missing(num_experts, num_ranks)
    uncovered = np.flatnonzero(missing.any(axis=1))

    def misplaced_expert(number: int) -> tuple[str, str]:
        at = misplaced[number]
        allowed = (
            f"an expert from 0 to {num_experts - 1}" if experts.is_active[at] else "-1 on an inactive rank"
        )
        return (
            f"{experts.rows[experts.row[at]].place}[{experts.slot[at]}]",
            f"{experts.ids[at]}, expected {allowed}",
        )

    def uncovered_layer(number: int) -> tuple[str, str]:
        layer = uncovered[number]
        return layers[layer].place, f"no device holds {_named(np.flatnonzero(missing[layer]))}"

    found.add_all(misplaced.size, misplaced_expert)
    found.add_all(uncovered.size, uncovered_layer)


def _objects(values: list[object], place: str, found: Faults) -> list[_Entry]:
    """The members of a list that are objects, as they should be."""
    entries = []
    for i, value in enumerate(values):
        if isinstance(value, dict):
            entries.append(_Entry(f"{place}[{i}]", value))
            _check_keys(entries[-1], found)
        else:
            found.add(f"{place}[{i}]", f"{shown(value)}, expected an object")
    return entries


def _check_keys(entry: _Entry, found: Faults) -> None:
    if isinstance(entry.content, strict_json.RepeatedKeys):
        for key in entry.content.keys_given_twice:
            found.add(entry.place, f"the key {shown(key)} stands more than once")


def _integer(entry: _Entry, key: str, found: Faults) -> int | None:
    value = entry.content.get(key)
    if type(value) is int:  # true is an int for isinstance
        return value
    found.add(_at(entry, key), _instead_of("an integer", entry, key))
    return None


def _list(entry: _Entry, key: str, found: Faults) -> list[object]:
    """The list under `key`; an empty one when there is none, which is a fault."""
    value = entry.content.get(key)
    if isinstance(value, list) and value:
        return value
    found.add(_at(entry, key), _instead_of("a list that is not empty", entry, key))
    return []


def _instead_of(expected: str, entry: _Entry, key: str) -> str:
    given = shown(entry.content[key]) if key in entry.content else "missing"
    return f"{given}, expected {expected}"


def _at(entry: _Entry, key: str) -> str:
    return f"{entry.place}.{key}" if entry.place else key


def _integers(values: list[object], place: str, found: Faults) -> list[int]:
    """`values` if they are all integers of a sane size, otherwise an empty list."""
    if set(map(type, values)) <= {int}:
        integers = cast("list[int]", values)
        if not integers or (min(integers) >= -_LARGEST_ID and max(integers) <= _LARGEST_ID):
            return integers
    for i, value in enumerate(values):
        if type(value) is not int or abs(value) > _LARGEST_ID:
            found.add(f"{place}[{i}]", f"{shown(value)}, expected the integer id of an expert")
    return []


def _ids(entries: list[_Entry], key: str, count: int, found: Faults) -> list[int | None]:
    """The ids of the entries, which are to be 0 to count - 1, each once; None for one that cannot be used."""
    place_of_id: dict[int, str] = {}
    ids: list[int | None] = []
    for entry in entries:
        number = _integer(entry, key, found)
        ids.append(None)
        if number is None:
            continue
        if not 0 <= number < count:
            found.add(_at(entry, key), f"{shown(number)}, expected 0 to {count - 1}")
        elif number in place_of_id:
            found.add(_at(entry, key), f"{number}, which {place_of_id[number]} has already")
        else:
            place_of_id[number] = entry.place
            ids[-1] = number
    return ids


def _most_common(counts: list[int]) -> int:
    """The count that stands most often, of several the first; 0 when there is none."""
    return Counter(counts).most_common(1)[0][0] if counts else 0


def _named(experts: NDArray[np.intp]) -> str:
    """The experts by their ids, shortened when they are many."""
    shown = ", ".join(str(expert) for expert in experts[:8])
    more = f" and {experts.size - 8} more" if experts.size > 8 else ""
    return f"expert{'s' if experts.size > 1 else ''} {shown}{more}"
