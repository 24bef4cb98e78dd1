"""`eplb validate`: every fault of an expert map or a record, or what a sound one holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eplb_platform.cli.files import format_name, identified, read_map, read_trace
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import expert_map_json, formats, sglang_location, tensorrt_llm_yaml, vllm_map
from eplb_platform.records.fault import Fault, RecordError
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

MOST_FAULTS = 10_000


@dataclass(frozen=True)
class Outcome:
    """What checking a file found: faults, or the map or the load."""

    path: Path
    faults: tuple[Fault, ...]
    expert_map: ExpertMap | None
    trace: LoadTrace | None = None

    @property
    def valid(self) -> bool:
        return not self.faults

    def lines(self) -> list[str]:
        """One line for each fault, with file and place; one line that describes a sound map."""
        if self.faults:
            return [" ".join(f"{self.path}: {fault}".split()) for fault in self.faults]
        if self.trace is not None:
            return [
                f"{self.path}: valid: recorded load of {self.trace.num_steps} steps, "
                f"{self.trace.num_layers} layers, {self.trace.num_logical_experts} experts"
            ]
        held = self.expert_map
        if held is None:
            return []
        wasted = int(held.same_rank_replicas.sum())
        note = f"; {wasted} replicas share a rank with another of the same expert" if wasted else ""
        return [
            f"{self.path}: valid: {held.num_layers} layers, {held.num_logical_experts} experts + "
            f"{held.num_redundant_experts} redundant, {held.topology.num_ranks} ranks "
            f"of {held.slots_per_rank} slots{note}"
        ]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        found: dict[str, object] = {
            "path": str(self.path),
            "valid": self.valid,
            "faults": [{"place": fault.place, "message": fault.message} for fault in self.faults],
        }
        if self.expert_map is not None:
            found |= {
                "layers": self.expert_map.num_layers,
                "logical_experts": self.expert_map.num_logical_experts,
                "redundant_experts": self.expert_map.num_redundant_experts,
                "ranks": self.expert_map.topology.num_ranks,
                "slots_per_rank": self.expert_map.slots_per_rank,
                "same_rank_replicas": int(self.expert_map.same_rank_replicas.sum()),
            }
        if self.trace is not None:
            found |= {
                "steps": self.trace.num_steps,
                "layers": self.trace.num_layers,
                "logical_experts": self.trace.num_logical_experts,
            }
        return found


def check(
    path: Path, *, ranks: int | None, experts: int | None, layers: int | None, format: str | None = None
) -> Outcome:
    """Check a file, of whatever engine, against itself and against the numbers that are given.

    Raises BadInput for an unknown format.
    """
    name = format_name(format)
    try:
        kind, name = identified(path, name)
        if kind == formats.TRACE:
            return _check_trace(path, name, experts, layers)
        found = _faults(path, name, experts, None if ranks is None else Topology(ranks))
        if found:
            return Outcome(path, tuple(found), None)
        held = read_map(
            path,
            format=name,
            topology=None if ranks is None else Topology(ranks),
            num_logical_experts=experts,
        )
    except RecordError as error:
        return Outcome(path, (error.fault,), None)
    if layers is not None and held.num_layers != layers:
        place = "moe_layer_count" if name == "vllm_ascend" else ""
        return Outcome(path, (Fault(place, f"{held.num_layers} layers, expected {layers}"),), None)
    return Outcome(path, (), held)


def _faults(path: Path, format: str, experts: int | None, topology: Topology | None) -> list[Fault]:
    listing = {
        "vllm_ascend": expert_map_json.faults,
        "tensorrt_llm": tensorrt_llm_yaml.faults,
        "sglang": sglang_location.faults,
        "vllm": vllm_map.faults,
    }[format]
    return listing(path, num_logical_experts=experts, topology=topology, limit=MOST_FAULTS)


def _check_trace(path: Path, format: str, experts: int | None, layers: int | None) -> Outcome:
    trace = read_trace(path, format)
    found = [
        Fault("", f"{count} {what}, expected {expected}")
        for what, count, expected in (
            ("logical experts", trace.num_logical_experts, experts),
            ("layers", trace.num_layers, layers),
        )
        if expected not in (None, count)
    ]
    return Outcome(path, tuple(found), None, trace)
