"""ExpertMap: which logical expert every physical expert (slot) holds, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from importlib import import_module
from math import gcd
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_platform.topology import Topology

_Int32: TypeAlias = NDArray[np.int32]

# A format is one module of records with `read` and `write`; a file's suffix names its format.
_MODULE_OF_FORMAT = {
    "json": "eplb_platform.records.expert_map_json",
    "vllm_ascend": "eplb_platform.records.expert_map_json",
    "tensorrt_llm": "eplb_platform.records.tensorrt_llm_yaml",
    "sglang": "eplb_platform.records.sglang_location",
    "vllm": "eplb_platform.records.vllm_map",
}
# What can be served by: files of the other formats do not say for how many ranks they are.
FORMAT_OF_SUFFIX = {".json": "json"}
_FORMAT_OF_SUFFIX = {
    **FORMAT_OF_SUFFIX,
    ".yaml": "tensorrt_llm",
    ".yml": "tensorrt_llm",
    ".pt": "sglang",
}


class ExpertMap:
    """An immutable placement of logical experts on physical experts; equal and hashed by content.

    physical_to_logical: [layers, physical] integers, the logical expert in each slot; rank r holds the
        slots r * slots_per_rank and following. -1 in every slot of an inactive rank, and nowhere else.
    num_logical_experts: experts of the model
    topology: ranks, nodes, active ranks

    All arrays that it gives out are read-only. Replicas of one expert on one rank are legal; see
    `same_rank_replicas`.

    Raises ValueError, naming layer, rank and value, for an array that is no [layers, physical] table of
    integers, slots that the ranks cannot share evenly, an id out of range, an inactive rank that holds an
    expert, and an expert without a replica in some layer.
    """

    def __init__(self, physical_to_logical: ArrayLike, num_logical_experts: int, topology: Topology) -> None:
        table = _integer_table(physical_to_logical)
        _check_shape(table, num_logical_experts, topology)
        _check_ids(table, num_logical_experts, topology)
        self._physical_to_logical = _read_only(table.astype(np.int32, order="C"))
        self._num_logical_experts = int(num_logical_experts)
        self._topology = topology
        self._check_coverage()

    @classmethod
    def initial(
        cls, num_layers: int, num_logical_experts: int, topology: Topology, num_redundant_experts: int = 0
    ) -> ExpertMap:
        """The contiguous layout that vLLM starts from: slot i holds expert i % num_logical_experts.

        The slots are those of the active ranks, in order. Raises ValueError when the active ranks cannot
        share the slots evenly.
        """
        slots = (
            _slots_per_rank(num_logical_experts, topology, num_redundant_experts) * topology.num_active_ranks
        )
        layer = np.arange(slots) % num_logical_experts
        return cls._same_in_every_layer(layer, num_layers, num_logical_experts, topology)

    @classmethod
    def round_robin(
        cls, num_layers: int, num_logical_experts: int, topology: Topology, num_redundant_experts: int = 0
    ) -> ExpertMap:
        """Expert e on active rank e % ranks, dealt out like cards; redundant slots go on dealing.

        Raises ValueError when the active ranks cannot share the slots evenly.
        """
        ranks = topology.num_active_ranks
        slots_per_rank = _slots_per_rank(num_logical_experts, topology, num_redundant_experts)
        card = np.arange(slots_per_rank * ranks)
        # Each time the ranks are dealt the same experts again, the deck is turned by one, so that the
        # replicas of an expert come to different ranks.
        rounds = card // num_logical_experts
        turned = rounds // (ranks // gcd(num_logical_experts, ranks))
        layer = ((card + turned) % num_logical_experts).reshape(slots_per_rank, ranks).T.reshape(-1)
        return cls._same_in_every_layer(layer, num_layers, num_logical_experts, topology)

    @classmethod
    def _same_in_every_layer(
        cls, layer: NDArray[np.int_], num_layers: int, num_logical_experts: int, topology: Topology
    ) -> ExpertMap:
        """`layer`: [slots of the active ranks], the experts of each layer."""
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, expected at least 1")
        by_rank = np.full((topology.num_ranks, layer.size // topology.num_active_ranks), -1, dtype=np.int32)
        by_rank[topology.is_active] = layer.reshape(topology.num_active_ranks, -1)
        return cls(np.tile(by_rank.reshape(-1), (num_layers, 1)), num_logical_experts, topology)

    @property
    def physical_to_logical(self) -> _Int32:
        """[layers, physical], the logical expert in each slot, -1 on inactive ranks."""
        return self._physical_to_logical

    @property
    def num_logical_experts(self) -> int:
        return self._num_logical_experts

    @property
    def topology(self) -> Topology:
        return self._topology

    @property
    def num_layers(self) -> int:
        return int(self._physical_to_logical.shape[0])

    @property
    def num_physical_experts(self) -> int:
        """Slots of all ranks, inactive ones included: the width of `physical_to_logical`."""
        return int(self._physical_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return self.num_physical_experts // self._topology.num_ranks

    @property
    def num_redundant_experts(self) -> int:
        """Slots of the active ranks beyond one for each logical expert."""
        return self.slots_per_rank * self._topology.num_active_ranks - self._num_logical_experts

    @cached_property
    def replica_count(self) -> _Int32:
        """[layers, logical], the slots that hold each expert."""
        width = self._num_logical_experts + 1
        # Shifted by one, so that the -1 of inactive ranks is counted apart.
        keys = self._physical_to_logical + 1 + np.arange(self.num_layers)[:, None] * width
        counts = np.bincount(keys.reshape(-1), minlength=self.num_layers * width)
        return _read_only(counts.reshape(self.num_layers, width)[:, 1:].astype(np.int32))

    @cached_property
    def logical_to_physical(self) -> _Int32:
        """[layers, logical, max_replicas], the slots of each expert, ascending; -1 pads."""
        return self.logical_to_physical_padded(int(self.replica_count.max()))

    def logical_to_physical_padded(self, width: int) -> _Int32:
        """[layers, logical, width]: as `logical_to_physical`, of a width that does not depend on the map.

        Raises ValueError when an expert has more than `width` replicas.
        """
        if width < self.replica_count.max():
            layer, expert = np.argwhere(self.replica_count > width)[0]
            raise ValueError(
                f"layer {layer}: expert {expert} has {self.replica_count[layer, expert]} replicas, "
                f"more than the table's width of {width}"
            )
        slots = np.argsort(self._physical_to_logical, axis=1, kind="stable").astype(np.int32)
        slots = slots[:, self.num_physical_experts - self.replica_count[0].sum() :]
        layers = np.arange(self.num_layers)[:, None]
        experts = self._physical_to_logical[layers, slots]
        first = np.cumsum(self.replica_count, axis=1) - self.replica_count
        replica = np.arange(slots.shape[1]) - first[layers, experts]
        table = np.full((self.num_layers, self._num_logical_experts, width), -1, dtype=np.int32)
        table[layers, experts, replica] = slots
        return _read_only(table)

    def derive_tables(self) -> None:
        """Compute `replica_count` and `logical_to_physical` now; they are kept, and found there later."""
        _ = self.logical_to_physical

    def by_rank(self) -> _Int32:
        """[layers, ranks, slots], the experts of each rank: a view of `physical_to_logical`."""
        return self._physical_to_logical.reshape(self.num_layers, self._topology.num_ranks, -1)

    def local_experts(self, rank: int, layer: int) -> _Int32:
        """[logical], the slot of `rank` that holds each expert, counted from the rank's first; -1: elsewhere.

        Of several replicas on the rank, the first. This is the expert map of the inference engines.
        """
        if not 0 <= rank < self._topology.num_ranks:
            raise ValueError(f"rank {rank} is out of range, expected 0 to {self._topology.num_ranks - 1}")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} is out of range, expected 0 to {self.num_layers - 1}")
        slot_of_expert = np.full(self._num_logical_experts, -1, dtype=np.int32)
        experts, first_slots = np.unique(self.by_rank()[layer, rank], return_index=True)
        held = experts >= 0
        slot_of_expert[experts[held]] = first_slots[held]
        return _read_only(slot_of_expert)

    @cached_property
    def same_rank_replicas(self) -> _Int32:
        """[layers], slots wasted on a further replica of an expert that the rank already holds."""
        held = np.sort(self.by_rank(), axis=2)
        repeated = (held[:, :, 1:] == held[:, :, :-1]) & (held[:, :, 1:] >= 0)
        return _read_only(repeated.sum(axis=(1, 2)).astype(np.int32))

    def replace_layers(self, layers: Sequence[int], other: ExpertMap) -> ExpertMap:
        """This map with `layers` taken from `other`, a map of the same shape and topology."""
        if (
            other._physical_to_logical.shape != self._physical_to_logical.shape
            or other._num_logical_experts != self._num_logical_experts
            or other._topology != self._topology
        ):
            raise ValueError(f"cannot take layers of {other!r} into {self!r}: the shapes differ")
        rows = np.asarray(layers, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_layers:
            raise ValueError(f"layers {list(layers)} are out of range, expected 0 to {self.num_layers - 1}")
        table = self._physical_to_logical.copy()
        table[rows] = other._physical_to_logical[rows]
        return ExpertMap(table, self._num_logical_experts, self._topology)

    def digest(self) -> str:
        """32 hexadecimal digits that depend on the content alone: the same on every rank and machine."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        topology = self._topology
        header = (
            self._physical_to_logical.shape,
            self._num_logical_experts,
            (topology.num_ranks, topology.num_nodes, topology.active_ranks),
        )
        content = blake2b(repr(header).encode(), digest_size=16)
        content.update(np.ascontiguousarray(self._physical_to_logical, dtype="<i4").data)
        return content.hexdigest()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        num_logical_experts: int | None = None,
        topology: Topology | None = None,
    ) -> ExpertMap:
        """The map in the file at `path`, whose format is `format` or what the suffix says.

        num_logical_experts, topology: what the file must fit; without them the file says it, on one node.
            Of the formats only "json" says the number of ranks: the others need the topology.
        Raises ValueError for an unknown format, `records.RecordError` for a file that is not a valid map.
        """
        record = _record_format(path, format)
        return record.read(path, num_logical_experts=num_logical_experts, topology=topology)

    def save(self, path: str | os.PathLike[str], *, format: str | None = None) -> None:
        """Write the map to `path`, atomically; folders that are missing are made."""
        _record_format(path, format).write(path, self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertMap):
            return NotImplemented
        return (
            self._num_logical_experts == other._num_logical_experts
            and self._topology == other._topology
            and np.array_equal(self._physical_to_logical, other._physical_to_logical)
        )

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return (
            f"ExpertMap({self.num_layers} layers, {self.num_logical_experts} logical and "
            f"{self.num_physical_experts} physical experts on {self._topology.num_ranks} ranks)"
        )

    def __reduce__(self) -> tuple[type[ExpertMap], tuple[_Int32, int, Topology]]:
        # Rebuilt, not copied: an array that went through pickle is writable again.
        return ExpertMap, (self._physical_to_logical, self._num_logical_experts, self._topology)

    def _check_coverage(self) -> None:
        missing = self.replica_count == 0
        if missing.any():
            layer = int(missing.any(axis=1).argmax())
            raise ValueError(f"layer {layer}: {_experts(np.flatnonzero(missing[layer]))} on no active rank")


class _RecordFormat(Protocol):
    """A module of records."""

    def read(
        self, path: str | os.PathLike[str], *, num_logical_experts: int | None, topology: Topology | None
    ) -> ExpertMap: ...

    def write(self, path: str | os.PathLike[str], expert_map: ExpertMap) -> None: ...


def _record_format(path: str | os.PathLike[str], name: str | None) -> _RecordFormat:
    """The module that reads and writes format `name`, by default the one that the suffix of `path` names."""
    if name is None:
        name = _FORMAT_OF_SUFFIX.get(Path(path).suffix.lower())
    if name is None:
        known = ", ".join(_FORMAT_OF_SUFFIX)
        raise ValueError(
            f"{os.fspath(path)}: the suffix names no format, expected one of {known}, or format="
        )
    if name not in _MODULE_OF_FORMAT:
        raise ValueError(
            f"unknown expert-map format {name!r}, expected one of {', '.join(_MODULE_OF_FORMAT)}"
        )
    return cast(_RecordFormat, import_module(_MODULE_OF_FORMAT[name]))


def _integer_table(physical_to_logical: ArrayLike) -> NDArray[np.integer]:
    try:
        table = np.asarray(physical_to_logical)
    except ValueError:
        raise ValueError("physical_to_logical is ragged, expected [layers, physical]") from None
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"physical_to_logical has shape {list(table.shape)}, expected [layers, physical]")
    if not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"physical_to_logical has dtype {table.dtype}, expected integers")
    return cast("NDArray[np.integer]", table)


def _check_shape(table: NDArray[np.integer], num_logical_experts: int, topology: Topology) -> None:
    num_physical_experts = table.shape[1]
    if num_logical_experts < 1:
        raise ValueError(f"num_logical_experts is {num_logical_experts}, expected at least 1")
    if num_physical_experts % topology.num_ranks:
        raise ValueError(
            f"{num_physical_experts} physical experts cannot be shared evenly by {topology.num_ranks} ranks"
        )


def _check_ids(table: NDArray[np.integer], num_logical_experts: int, topology: Topology) -> None:
    """Ids in range on active ranks, -1 on inactive ones."""
    active = np.repeat(topology.is_active, table.shape[1] // topology.num_ranks)
    wrong = np.where(active, (table < 0) | (table >= num_logical_experts), table != -1)
    if not wrong.any():
        return
    layer, slot = (int(i) for i in np.argwhere(wrong)[0])
    rank, local_slot = divmod(slot, table.shape[1] // topology.num_ranks)
    expected = (
        f"a logical expert from 0 to {num_logical_experts - 1}" if active[slot] else "-1 on an inactive rank"
    )
    raise ValueError(
        f"layer {layer}, rank {rank}, slot {local_slot}: {int(table[layer, slot])}, expected {expected}"
    )


def _slots_per_rank(num_logical_experts: int, topology: Topology, num_redundant_experts: int) -> int:
    if num_logical_experts < 1:
        raise ValueError(f"num_logical_experts is {num_logical_experts}, expected at least 1")
    if num_redundant_experts < 0:
        raise ValueError(f"num_redundant_experts is {num_redundant_experts}, expected at least 0")
    slots_per_rank, left_over = divmod(num_logical_experts + num_redundant_experts, topology.num_active_ranks)
    if left_over:
        ranks = topology.num_active_ranks
        raise ValueError(
            f"{num_logical_experts} logical and {num_redundant_experts} redundant experts cannot be shared "
            f"evenly by {ranks} active ranks, {num_redundant_experts + ranks - left_over} redundant ones can"
        )
    return slots_per_rank


def _experts(ids: NDArray[np.intp]) -> str:
    """`ids` as the subject of a sentence, shortened when they are many."""
    if ids.size == 1:
        return f"expert {ids[0]} is"
    shown = ", ".join(str(expert) for expert in ids[:8])
    return f"experts {shown} are" if ids.size <= 8 else f"experts {shown} and {ids.size - 8} more are"


def _read_only(array: _Int32) -> _Int32:
    array.flags.writeable = False
    return array
