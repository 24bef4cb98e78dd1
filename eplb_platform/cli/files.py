"""Maps and recorded load of any engine, as the commands take them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from eplb_platform.cli import BadInput
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import (
    expert_map_json,
    formats,
    partial_trace,
    sglang_location,
    tensorrt_llm_yaml,
    vllm_map,
)
from eplb_platform.records.fault import Fault, RecordError
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

MAP_FORMAT_OF_SUFFIX = {
    ".json": "vllm_ascend",
    ".yaml": "tensorrt_llm",
    ".yml": "tensorrt_llm",
    ".pt": "sglang",
}
# Names that people give, and what they mean.
_ALIASES = {"json": "vllm_ascend", "safetensors": "trace", "statistics": "tensorrt_llm"}


def serving_line(path: Path, format: str, expert_map: ExpertMap) -> str:
    """How an engine is started with the map at `path`, which is of this format."""
    ranks = expert_map.topology.num_ranks
    if format == "vllm_ascend":
        config = shlex.quote(json.dumps({"eplb_config": {"expert_map_path": str(path)}}))
        flags = f"--enable-expert-parallel --additional-config {config}"
        return f"vllm-ascend, and vLLM with this plugin, on {ranks} EP ranks: {flags}"
    if format == "sglang":
        flags = f"--ep-size {ranks} --ep-num-redundant-experts {expert_map.num_redundant_experts}"
        return f"SGLang: {flags} --init-expert-location {shlex.quote(str(path))}"
    if format == "tensorrt_llm":
        config = f"moe_expert_parallel_size: {ranks}, moe_config: {{load_balancer: {path}}}"
        return f"TensorRT-LLM: {config} in its configuration file"
    return "vLLM: no option; with this plugin it takes vllm-ascend's format"


def format_name(text: str | None) -> str | None:
    """The format that `text` names: vllm-ascend, tensorrt-llm, sglang, vllm or trace. Raises BadInput."""
    if text is None:
        return None
    name = text.lower().replace("-", "_")
    name = _ALIASES.get(name, name)
    known = dict.fromkeys((*formats.MAP_FORMATS, *formats.TRACE_FORMATS))
    if name not in known:
        names = ", ".join(each.replace("_", "-") for each in known)
        raise BadInput(f"unknown format {text!r}, expected one of {names}")
    return name


def identified(path: Path, format: str | None) -> tuple[str, str]:
    """Kind and format of what is at `path`, of the format that was named if one was. Raises RecordError."""
    if format is None:
        return formats.detect(path)
    if format not in formats.TRACE_FORMATS:
        return formats.MAP, format
    if format not in formats.MAP_FORMATS:
        return formats.TRACE, format
    kind, found = formats.detect(path)
    if found != format:
        raise RecordError(path, Fault("", f"{kind} of format {found}, expected {format}"))
    return kind, format


def fitting(path: Path, topology: Topology | None) -> Topology | None:
    """What a map's file is read with: --ep-size is for those that do not say theirs."""
    if topology is None or path.suffix.lower() != ".json":
        return topology
    return None if formats.detect(path)[1] == "vllm_ascend" else topology


def read_map(
    path: Path,
    *,
    format: str | None = None,
    topology: Topology | None = None,
    num_logical_experts: int | None = None,
    num_layers: int | None = None,
    first_moe_layer: int = 0,
) -> ExpertMap:
    """The map in the file at `path`, whatever engine it is for.

    topology: needed where the file does not say its number of ranks, and otherwise what it must fit
    num_layers: MoE layers that are expected: an SGLang map may have more rows, of dense layers in front
    first_moe_layer: dense layers in front, where they are known

    Raises RecordError.
    """
    kind, name = identified(path, format)
    if kind != formats.MAP:
        raise RecordError(path, Fault("", f"recorded load ({name}), expected an expert map"))
    if name == "vllm_ascend":
        return expert_map_json.read(path, num_logical_experts=num_logical_experts, topology=topology)
    if name == "tensorrt_llm":
        return tensorrt_llm_yaml.read(path, num_logical_experts=num_logical_experts, topology=topology)
    if name == "vllm":
        return vllm_map.read(path, num_logical_experts=num_logical_experts, topology=topology)

    def of_sglang(dense: int) -> ExpertMap:
        return sglang_location.read(
            path, num_logical_experts=num_logical_experts, topology=topology, first_moe_layer=dense
        )

    found = of_sglang(first_moe_layer)
    if not first_moe_layer and num_layers is not None and found.num_layers > num_layers:
        return of_sglang(found.num_layers - num_layers)
    return found


def write_map(path: Path, expert_map: ExpertMap, format: str, first_moe_layer: int = 0) -> None:
    """Write the map, with the model's numbers of layers where the format has them. Raises RecordError."""
    if format == "tensorrt_llm":
        tensorrt_llm_yaml.write(path, expert_map, first_moe_layer=first_moe_layer)
    elif format == "sglang":
        sglang_location.write(path, expert_map, first_moe_layer=first_moe_layer)
    elif format == "vllm":
        vllm_map.write(path, expert_map)
    else:
        expert_map_json.write(path, expert_map)


def check_output(output: Path | None, inputs: Iterable[Path]) -> None:
    """Raise BadInput where writing `output` would destroy one of the files or folders that are read."""
    if output is None or not output.exists():
        return
    place = output.resolve()
    for path in inputs:
        given = path.resolve()
        if place == given or given in place.parents or (path.is_file() and output.samefile(path)):
            raise BadInput(f"{output}: would replace the input {path}, expected another file")


def iterations(text: str | None) -> range | None:
    """A-B: from iteration A up to B, without B, as in EXPERT_STATISTIC_ITER_RANGE. Raises BadInput."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,12})-(\d{1,12})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise BadInput(f"--iter-range {text}: expected A-B, from A up to but without a larger B")
    return range(int(match[1]), int(match[2]))


def read_trace(path: Path, format: str | None = None) -> LoadTrace:
    """The load at `path`, whatever engine recorded it. Raises RecordError.

    Says on standard error what is missing in it because its writer has not finished.
    """
    try:
        trace = formats.read_trace(path, format=format)
    except RecordError:
        if not path.exists():
            _say_what_lies_beside(path, 0)
        raise
    state = partial_trace.state(path)
    if state is None:
        _say_what_lies_beside(path, trace.num_steps)
    elif state.at_work:
        _note(f"{path}: its writer is at work: read as it is now, {trace.num_steps} steps")
    elif trace.num_steps < state.num_rows:
        rest = state.num_rows - trace.num_steps
        _note(f"{path}: step {trace.num_steps} is damaged: left out with what follows, {rest} steps in all")
    return trace


def _say_what_lies_beside(path: Path, num_steps: int) -> None:
    """One line where a writer that was killed left more steps than the trace at `path` has."""
    beside = partial_trace.beside(path)
    state = partial_trace.state(beside)
    if state is not None and not state.at_work and state.num_steps > num_steps:
        command = shlex.join(["eplb", "convert", str(beside), "-o", str(path)])
        _note(
            f"{path}: {num_steps} steps, but its writer was killed and left {state.num_steps} in "
            f"{beside.name}; for a trace of all: {command}"
        )


def _note(message: str) -> None:
    print("eplb: note:", *message.split(), file=sys.stderr)
