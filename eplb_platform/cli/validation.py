"""`eplb validate`: every fault of an expert map file, or what a sound one holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import expert_map_json
from eplb_platform.records.fault import Fault
from eplb_platform.topology import Topology

MOST_FAULTS = 10_000


@dataclass(frozen=True)
class Outcome:
    """What checking a file found: faults, or the map."""

    path: Path
    faults: tuple[Fault, ...]
    expert_map: ExpertMap | None

    @property
    def valid(self) -> bool:
        return not self.faults

    def lines(self) -> list[str]:
        """One line for each fault, with file and place; one line that describes a sound map."""
        if self.expert_map is None:
            return [" ".join(f"{self.path}: {fault}".split()) for fault in self.faults]
        held = self.expert_map
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
        return found


def check(path: Path, *, ranks: int | None, experts: int | None, layers: int | None) -> Outcome:
    """Check a file against itself and against the numbers that are given."""
    topology = None if ranks is None else Topology(ranks)
    found = list(
        expert_map_json.faults(path, num_logical_experts=experts, topology=topology, limit=MOST_FAULTS)
    )
    if found:
        return Outcome(path, tuple(found), None)
    held = expert_map_json.read(path, num_logical_experts=experts, topology=topology)
    if layers is not None and held.num_layers != layers:
        fault = Fault("moe_layer_count", f"{held.num_layers}, expected {layers}")
        return Outcome(path, (fault,), None)
    return Outcome(path, (), held)
