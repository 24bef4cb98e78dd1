"""What somebody might put where a record is expected: every reader refuses it, quickly and in one line."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform.offline.hardware import read_profile
from eplb_platform.records import (
    RecordError,
    compute_cost,
    expert_map_json,
    formats,
    load_trace,
    sglang_location,
    sglang_recorder,
    strict_yaml,
    tensorrt_llm_statistics,
    tensorrt_llm_yaml,
    vllm_map,
)

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "expert map": (".json", expert_map_json.read),
    "sglang map": (".json", sglang_location.read),
    "sglang map, torch": (".pt", sglang_location.read),
    "tensorrt-llm map": (".yaml", tensorrt_llm_yaml.read),
    "vllm map": (".json", vllm_map.read),
    "trace": (".safetensors", load_trace.read),
    "sglang dump": (".pt", sglang_recorder.read),
    "sglang dump, json": (".json", sglang_recorder.read),
    "cost": (".json", compute_cost.read),
    "cost, npy": (".npy", compute_cost.read),
    "cost, safetensors": (".safetensors", compute_cost.read),
    "hardware": (".yaml", read_profile),
    "any map": (".json", formats.detect),
    "any load": (".pt", formats.read_trace),
}
HUGE_HEADER = struct.pack("<Q", 1 << 60) + b"{}"


def claims_much() -> bytes:
    """A safetensors header whose tensors are larger than any memory."""
    header = {
        "expert_load": {
            "dtype": "I64",
            "shape": [10**12, 58, 256],
            "data_offsets": [0, 10**12 * 58 * 256 * 8],
        }
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(4096),
    "a huge header": HUGE_HEADER,
    "much claimed": claims_much(),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b"[[" + b"9" * 100_000 + b"]]",
    "a huge number in a map": b'{"moe_layer_count": 1e308, "layer_list": 99999999999999999999}',
    "not a number": b"[[NaN, Infinity]]",
    "no text": b"\xff\xfe\x00\x80",
    "aliases": b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "a tag": b"!!python/object/apply:os.system ['true']",
    "a pickle": b"\x80\x04cos\nsystem\nX\x04\x00\x00\x00truetR.",
    "a pickled array": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    + b" " * 60,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", CONTENTS)
def test_hostile_content_is_refused_in_one_line(name: str, reader: str, tmp_path: Path) -> None:
    suffix, read = READERS[reader]
    path = tmp_path / f"record{suffix}"
    path.write_bytes(CONTENTS[name])
    if reader == "any map":  # which only says what a file is
        read = lambda path: tensorrt_llm_yaml.read(path) if formats.detect(path) else None  # noqa: E731
    with pytest.raises(RecordError) as refused:
        read(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["loop", "dangling", "pipe", "device", "folder"])
def test_places_that_hold_no_file_are_refused_without_waiting(kind: str, reader: str, tmp_path: Path) -> None:
    suffix, read = READERS[reader]
    path = tmp_path / f"record{suffix}"
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(RecordError):
        read(path)


@pytest.mark.parametrize("reader", ["sglang map, torch", "sglang dump", "any load"])
def test_a_zip_bomb_is_not_unpacked(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "record.pt"
    zip_bomb(path)
    with pytest.raises(RecordError, match="compress"):
        READERS[reader][1](path)


def test_a_pickled_array_of_costs_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    np.save(tmp_path / "cost.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    torch.save({"physical_to_logical_map": Evil()}, tmp_path / "location.pt")
    for path, read in (("cost.npy", compute_cost.read), ("location.pt", sglang_location.read)):
        with pytest.raises(RecordError):
            read(tmp_path / path)
    assert not (tmp_path / "ran").exists()


# --- folders ---


def statistics(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": 4, "num_experts_per_token": 1}))
    safetensors.numpy.save_file(tensors or {"0_0": np.ones(4, np.int64)}, str(folder / "rank0.safetensors"))
    return folder


@pytest.mark.parametrize("name", ["meta_info.json", "rank0.safetensors"])
@pytest.mark.parametrize("kind", ["loop", "dangling", "pipe", "device"])
def test_a_folder_with_what_is_no_file_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    folder = statistics(tmp_path / "statistics")
    place = folder / name
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to({"loop": place, "dangling": tmp_path / "none", "device": Path("/dev/zero")}[kind])
    with pytest.raises(RecordError):
        tensorrt_llm_statistics.read(folder)


@pytest.mark.parametrize(
    "names",
    [
        ("0_0", f"{10**11}_0"),
        ("0_0", f"0_{10**11}"),
        ("0_" + "9" * 5000,),
        ("../../0_0",),
        ("/etc/0_0",),
        ("-1_0",),
    ],
    ids=["far iterations", "far layers", "long number", "a path", "a root path", "negative"],
)
def test_names_in_statistics_are_numbers_that_belong_together(names: tuple[str, ...], tmp_path: Path) -> None:
    """Were room made for all iterations up to the last, it would be more than any memory."""
    folder = statistics(tmp_path / "statistics", **{name: np.ones(4, np.int64) for name in names})
    with pytest.raises(RecordError):
        tensorrt_llm_statistics.read(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["statistics"]


def test_a_folder_of_dumps_may_hold_links_but_no_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "expert_distribution_recorder_1.5.pt")
    with pytest.raises(RecordError):
        sglang_recorder.read(tmp_path)


# --- anything ---

KEYS = [
    "moe_layer_count",
    "layer_list",
    "device_list",
    "device_expert",
    "physical_to_logical_map",
    "records",
    "logical_count",
    "num_slots",
    "initial_global_assignments",
    "name",
    "device",
    "links",
    "x",
]
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(document=documents)
def test_any_json_is_a_record_or_an_error(document: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(document))
    for read in (
        expert_map_json.read,
        sglang_location.read,
        vllm_map.read,
        sglang_recorder.read,
        compute_cost.read,
    ):
        try:
            read(path)
        except RecordError as error:
            assert "\n" not in str(error)
    for read_yaml in (tensorrt_llm_yaml.read, read_profile, strict_yaml.read):
        try:
            read_yaml(path)
        except RecordError as error:
            assert "\n" not in str(error)
