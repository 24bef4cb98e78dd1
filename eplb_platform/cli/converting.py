"""`eplb convert`: maps and recorded load from one engine's format to another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eplb_platform.cli import BadInput, bad_input
from eplb_platform.cli.files import (
    MAP_FORMAT_OF_SUFFIX,
    check_output,
    format_name,
    identified,
    read_map,
    read_trace,
    serving_line,
    write_map,
)
from eplb_platform.records import formats, load_trace, sglang_recorder, tensorrt_llm_statistics
from eplb_platform.records.fault import RecordError
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology


@dataclass(frozen=True)
class Request:
    """What the command was asked for; see the options of `eplb convert`."""

    source: Path
    output: Path
    source_format: str | None = None
    output_format: str | None = None
    ep_size: int | None = None
    num_experts: int | None = None
    first_moe_layer: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What was read and what was written."""

    request: Request
    kind: str
    source_format: str
    output_format: str
    summary: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.request.source} ({self.source_format}) -> {self.request.output} ({self.output_format}): "
            f"{self.kind}, {self.summary}",
            *(f"note: {note}" for note in self.notes),
        ]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "kind": self.kind,
            "source": str(self.request.source),
            "source_format": self.source_format,
            "output": str(self.request.output),
            "output_format": self.output_format,
            "notes": list(self.notes),
        }


def convert(request: Request) -> Outcome:
    """Read, check and write. Raises BadInput for what cannot be read, held or written."""
    try:
        kind, source_format = identified(request.source, format_name(request.source_format))
        output_format = _output_format(request, kind)
        check_output(request.output, [request.source])
        if kind == formats.MAP:
            return _convert_map(request, source_format, output_format)
        return _convert_trace(request, source_format, output_format)
    except (RecordError, ValueError) as error:
        raise bad_input("convert", error) from error


def _output_format(request: Request, kind: str) -> str:
    """The format that was asked for, or what the name of the output says."""
    known = formats.MAP_FORMATS if kind == formats.MAP else formats.TRACE_FORMATS
    name = format_name(request.output_format)
    suffix = request.output.suffix.lower()
    if name is None and kind == formats.MAP:
        name = MAP_FORMAT_OF_SUFFIX.get(suffix)
    elif name is None:
        name = {".safetensors": "trace", ".pt": "sglang", ".json": "sglang", "": "tensorrt_llm"}.get(suffix)
    if name is None or name not in known:
        names = ", ".join(each.replace("_", "-") for each in known)
        what = "an expert map" if kind == formats.MAP else "recorded load"
        if kind == formats.TRACE and name in formats.MAP_FORMATS:
            raise BadInput(
                f"convert: {request.source} is recorded load, which a map cannot hold: "
                f"eplb plan {request.source} -o {request.output} makes a map for it"
            )
        raise BadInput(f"convert: {request.source} is {what}: give --to, one of {names}")
    return name


def _convert_map(request: Request, source_format: str, output_format: str) -> Outcome:
    dense = request.first_moe_layer or 0
    expert_map = read_map(
        request.source,
        format=source_format,
        topology=None if request.ep_size is None else Topology(request.ep_size),
        num_logical_experts=request.num_experts,
        first_moe_layer=dense if source_format == "sglang" else 0,
    )
    write_map(request.output, expert_map, output_format, dense)
    notes = []
    if output_format in ("sglang", "tensorrt_llm") and request.first_moe_layer is None:
        notes.append(
            "layers are numbered from 0: for a model that begins with dense layers give --first-moe-layer"
        )
    wasted = int(expert_map.same_rank_replicas.sum())
    if wasted and output_format == "vllm_ascend":
        notes.append(
            f"{wasted} replicas share a rank with another of the same expert, which vllm-ascend takes for "
            "different ones: it would route tokens wrong; make another map with eplb plan"
        )
    notes.append(f"served with by {serving_line(request.output, output_format, expert_map)}")
    summary = (
        f"{expert_map.num_layers} layers, {expert_map.num_logical_experts} experts + "
        f"{expert_map.num_redundant_experts} redundant, "
        f"{expert_map.topology.num_ranks} ranks of {expert_map.slots_per_rank} slots"
    )
    return Outcome(request, "map", source_format, output_format, summary, tuple(notes))


def _lost_in_a_dump(trace: LoadTrace) -> list[str]:
    """What does not come back from SGLang's dump, where nothing tells no tokens from nothing recorded."""
    step_has_tokens = np.zeros(trace.num_steps, dtype=np.bool_)
    layer_has_tokens = np.zeros(trace.num_layers, dtype=np.bool_)
    for step, load in enumerate(trace.expert_load):
        of_layer = load.any(axis=1)
        step_has_tokens[step] = of_layer.any()
        layer_has_tokens |= of_layer
    if not step_has_tokens.any():
        raise BadInput("no token in any step, which a dump of SGLang cannot hold")
    idle, leading = int((~step_has_tokens).sum()), int(layer_has_tokens.argmax())
    notes = []
    if idle:
        notes.append(f"{idle} steps have no tokens: whoever reads the dump leaves them out")
    if leading:
        notes.append(
            f"the first {leading} layers have no tokens: whoever reads the dump takes them for dense"
        )
    return notes


def _convert_trace(request: Request, source_format: str, output_format: str) -> Outcome:
    trace = read_trace(request.source, source_format)
    notes = []
    metadata = dict(trace.metadata)
    if request.first_moe_layer is not None:
        metadata["first_moe_layer"] = str(request.first_moe_layer)
    trace = LoadTrace(trace.expert_load, trace.phase, metadata)
    if output_format == "tensorrt_llm":
        if "num_experts_per_token" not in metadata:
            notes.append("num_experts_per_token is not known: meta_info.json says 1")
        tensorrt_llm_statistics.write(request.output, trace, ep_size=request.ep_size)
    elif output_format == "sglang":
        notes += _lost_in_a_dump(trace)
        sglang_recorder.write(request.output, trace)
    else:
        load_trace.write(request.output, trace)
    if request.output.suffix == ".json":
        notes.append(f"this is load and no map: eplb plan {request.output} makes a map for it")
    if output_format != "trace" and trace.num_steps and (trace.phase != formats.MIXED).any():
        notes.append("the format does not hold phases: they are lost")
    summary = f"{trace.num_steps} steps, {trace.num_layers} layers, {trace.num_logical_experts} experts"
    return Outcome(request, "recorded load", source_format, output_format, summary, tuple(notes))
