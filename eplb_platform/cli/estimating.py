"""What the commands that estimate time are asked alike: hardware, model shape, ranks, configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from eplb_platform.cli import BadInput
from eplb_platform.config import EplbConfig
from eplb_platform.offline.hardware import HardwareProfile, ModelShape, load_profile
from eplb_platform.offline.report import metadata_number
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

DEFAULT_HARDWARE = "h100"
COLLECTIONS = 5
"""A trace too short for the default interval is cut into so many collections."""


@dataclass(frozen=True)
class Deployment:
    """Where the model is to be served: a profile's name or file, ranks and nodes.

    model: KEY=VALUE of the profile's model shape
    """

    hardware: str = DEFAULT_HARDWARE
    model: Sequence[str] = ()
    ep_size: int | None = None
    num_nodes: int | None = None
    num_expert_groups: int = 1

    def profile(self, trace: LoadTrace) -> HardwareProfile:
        """Experts for each token are those of the record where it says so. Raises BadInput, RecordError."""
        changes: dict[str, float] = {}
        if recorded := metadata_number(trace, "num_experts_per_token"):
            changes["experts_per_token"] = recorded
        for text in self.model:
            key, equals, value = text.partition("=")
            if not equals or key not in ModelShape.model_fields:
                raise BadInput(f"--model {text}: expected KEY=NUMBER of {', '.join(ModelShape.model_fields)}")
            changes[key] = _number(text, value)
        try:
            return load_profile(self.hardware).with_model(changes)
        except ValueError as error:
            raise BadInput(str(error)) from error

    def topology(self, ep_size: int, profile: HardwareProfile) -> Topology:
        """`ep_size` ranks on as many nodes as the profile's node is wide, unless the nodes are given."""
        nodes = self.num_nodes or -(-ep_size // profile.links.ranks_per_node)
        return Topology(ep_size, nodes)


def configuration(settings: Sequence[str], num_steps: int) -> EplbConfig:
    """eplb_config from KEY=VALUE, values as in JSON or as text. Raises BadInput.

    The intervals' defaults shrink with a trace that is too short for them.
    """
    values: dict[str, object] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise BadInput(f"--set {text}: expected KEY=VALUE of eplb_config")
        try:
            values[key] = json.loads(value)
        except (json.JSONDecodeError, RecursionError, ValueError):
            values[key] = value
    interval = "expert_heat_collection_interval"
    if interval not in values:
        default = int(EplbConfig.model_fields[interval].default)
        values[interval] = max(1, min(default, num_steps // COLLECTIONS))
    delay = "algorithm_execution_interval"
    collected = values[interval]
    if delay not in values and isinstance(collected, int):
        values[delay] = min(int(EplbConfig.model_fields[delay].default), collected // 4)
    try:
        return EplbConfig(**values)  # type: ignore[arg-type]  # checked by the fields
    except ValueError as error:
        raise BadInput(str(error)) from error


def fewest_redundant(num_experts: int, ep_size: int) -> int:
    """Redundant experts without which the ranks would not have equally many slots."""
    return -num_experts % ep_size


def _number(text: str, value: str) -> float:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise BadInput(f"--model {text}: expected a number")
