"""Which format a file is in, and reading it whatever it is.

kind    format         what it is
map     vllm_ascend    expert-map JSON; also called json
map     tensorrt_llm   moe_load_balancer.yaml
map     sglang         --init-expert-location, .json or .pt
map     vllm           lists of experts as JSON
trace   trace          load trace of this project, .safetensors, or what its writer left, .partial
trace   tensorrt_llm   statistics folder
trace   sglang         recorder dumps, .pt or .json, or a folder of them
"""

from __future__ import annotations

import os
from pathlib import Path

from eplb_platform.records import (
    load_trace,
    partial_trace,
    sglang_recorder,
    strict_json,
    tensorrt_llm_statistics,
    torch_file,
)
from eplb_platform.records.fault import Fault, RecordError
from eplb_platform.records.load_trace import LoadTrace

MAP, TRACE = "map", "trace"
MIXED = load_trace.NUM_PHASES - 1  # the phase of steps whose phase is not known
MAP_FORMATS = ("vllm_ascend", "tensorrt_llm", "sglang", "vllm")
TRACE_FORMATS = ("trace", "tensorrt_llm", "sglang")
_OF_SUFFIX = {
    ".safetensors": (TRACE, "trace"),
    partial_trace.SUFFIX: (TRACE, "trace"),
    ".yaml": (MAP, "tensorrt_llm"),
    ".yml": (MAP, "tensorrt_llm"),
}


def detect(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Kind and format of what is at `path`, by its suffix or, for JSON, .pt and folders, by what is in it.

    Raises RecordError when it is none of them; what it is said to be may still be faulty.
    """
    place = Path(path)
    if place.is_dir():
        if (place / tensorrt_llm_statistics.META_INFO).exists():
            return TRACE, "tensorrt_llm"
        if any(place.glob("*.pt")):
            return TRACE, "sglang"
        message = "a folder without meta_info.json and .pt files, expected statistics or dumps"
        raise RecordError(path, Fault("", message))
    suffix = place.suffix.lower()
    if partial_trace.begins_at(place):
        return TRACE, "trace"
    if suffix in _OF_SUFFIX:
        return _OF_SUFFIX[suffix]
    if suffix == ".pt":
        return _by_keys(torch_file.read(path)) or (MAP, "sglang")
    document = strict_json.read(path)
    if isinstance(document, list):
        return MAP, "vllm"
    return _by_keys(document) or (MAP, "vllm_ascend")


def read_trace(path: str | os.PathLike[str], *, format: str | None = None) -> LoadTrace:
    """The load at `path`, in whatever format it is. Raises RecordError, ValueError for an unknown format."""
    if format is None:
        kind, format = (TRACE, "trace") if Path(path).suffix.lower() == ".safetensors" else detect(path)
        if kind != TRACE:
            raise RecordError(path, Fault("", f"an expert map ({format}), expected recorded load"))
    readers = {
        "trace": load_trace.read,
        "tensorrt_llm": tensorrt_llm_statistics.read,
        "sglang": sglang_recorder.read,
    }
    if format not in readers:
        raise ValueError(f"unknown trace format {format!r}, expected one of {', '.join(readers)}")
    return readers[format](path)


def _by_keys(document: object) -> tuple[str, str] | None:
    """What an object's keys say that it is; None when they say nothing."""
    if not isinstance(document, dict):
        return None
    if "physical_to_logical_map" in document:
        return MAP, "sglang"
    if "records" in document or sglang_recorder.COUNT in document:
        return TRACE, "sglang"
    return None
