"""Hardware profiles: what a device, its links and a model's experts are, for estimates of time.

A profile is a small YAML file; those in `profiles/` are known by name, and docs/offline.md says how to write
one's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eplb_platform.records import strict_yaml
from eplb_platform.records.fault import Fault, RecordError, shown

_Amount: TypeAlias = Annotated[float, Field(gt=0, le=1e15)]
_Overhead: TypeAlias = Annotated[float, Field(ge=0, le=1e15)]
_Part: TypeAlias = Annotated[float, Field(gt=0, le=1)]
_Count: TypeAlias = Annotated[int, Field(ge=1, le=10**12)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Device(_Section):
    """One rank's device. An efficiency is the part of the peak that is attained."""

    peak_tflops: _Amount
    compute_efficiency: _Part
    memory_gb: _Amount
    memory_bandwidth_gb_s: _Amount
    memory_efficiency: _Part
    layer_overhead_us: _Overhead = 0.0

    @property
    def flops(self) -> float:
        """Floating-point operations in a second, as attained."""
        return self.peak_tflops * 1e12 * self.compute_efficiency

    @property
    def memory_bandwidth(self) -> float:
        """Bytes in a second, as attained."""
        return self.memory_bandwidth_gb_s * 1e9 * self.memory_efficiency


class Links(_Section):
    """One rank's links, each way. A latency is that of a whole dispatch or combine.

    migration_share: the part of a link that moving experts takes while it lasts; tokens have the rest then
    agreement_ms: what one agreement of all ranks through the store takes
    """

    ranks_per_node: _Count
    intra_node_gb_s: _Amount
    inter_node_gb_s: _Amount
    efficiency: _Part
    intra_node_latency_us: _Overhead = 0.0
    inter_node_latency_us: _Overhead = 0.0
    migration_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    agreement_ms: _Overhead = 5.0

    @property
    def intra_node_bandwidth(self) -> float:
        """Bytes in a second within a node, as attained."""
        return self.intra_node_gb_s * 1e9 * self.efficiency

    @property
    def inter_node_bandwidth(self) -> float:
        """Bytes in a second between nodes, as attained."""
        return self.inter_node_gb_s * 1e9 * self.efficiency


class ModelShape(_Section):
    """One layer of the model; DeepSeek-R1 with weights of one byte by default.

    other_parameters: of attention and shared experts, which every rank holds and computes for its own tokens
    """

    hidden_size: _Count = 7168
    expert_intermediate_size: _Count = 2048
    experts_per_token: _Count = 8
    bytes_per_weight: _Amount = 1.0
    dispatch_bytes_per_value: _Amount = 1.0
    combine_bytes_per_value: _Amount = 2.0
    other_parameters: Annotated[int, Field(ge=0, le=10**15)] = 231_000_000

    @property
    def expert_parameters(self) -> int:
        """Of one expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def expert_bytes(self) -> float:
        return self.expert_parameters * self.bytes_per_weight


class HardwareProfile(_Section):
    """What times are estimated from; every quantity has its unit in its name."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    device: Device
    links: Links
    model: ModelShape = ModelShape()

    def with_model(self, changes: Mapping[str, float]) -> HardwareProfile:
        """This profile for another model shape. Raises ValueError for a value that cannot be."""
        try:
            model = ModelShape.model_validate(self.model.model_dump() | dict(changes))
        except ValidationError as error:
            fault = _first_fault(error)
            raise ValueError(f"model.{fault}") from None
        return self.model_copy(update={"model": model})


def load_profile(name_or_path: str | os.PathLike[str]) -> HardwareProfile:
    """The profile of a packaged name, or in the YAML file at a path.

    Raises RecordError, with the key and what was expected, and ValueError for an unknown name.
    """
    text = os.fspath(name_or_path)
    packaged = _packaged()
    if text.lower() in packaged:
        with as_file(files("eplb_platform.offline") / "profiles" / f"{text.lower()}.yaml") as path:
            return read_profile(path)
    if Path(text).suffix.lower() not in (".yaml", ".yml"):
        nearest = get_close_matches(text.lower(), packaged, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"no hardware profile {text!r}, expected {', '.join(packaged)} or FILE.yaml.{hint}")
    return read_profile(text)


def read_profile(path: str | os.PathLike[str]) -> HardwareProfile:
    """The profile in the YAML file at `path`. Raises RecordError."""
    document = strict_yaml.read(path)
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise RecordError(path, Fault("", f"{shown(document)}, expected the keys name, device, links, model"))
    try:
        return HardwareProfile.model_validate(document)
    except ValidationError as error:
        raise RecordError(path, _first_fault(error)) from None


def _packaged() -> list[str]:
    folder = files("eplb_platform.offline") / "profiles"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def _first_fault(error: ValidationError) -> Fault:
    details = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in details["loc"])
    if details["type"] == "missing":
        return Fault(place, "missing")
    if details["type"] == "extra_forbidden":
        return Fault(place, "unknown key")
    wanted = details["msg"].removeprefix("Input should be ")
    return Fault(place, f"{shown(details['input'])}, expected {wanted}")
