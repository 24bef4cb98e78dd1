"""Load as TensorRT-LLM and SGLang record it: their own layouts, round trips, faults, fuzz."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_platform.records import (
    RecordError,
    formats,
    load_trace,
    sglang_recorder,
    spool,
    tensorrt_llm_statistics,
)
from eplb_platform.records.load_trace import LoadTrace
from tests.unit.engine_files import sglang_pass_dumps, sglang_stat_dump
from tests.unit.engine_files import tensorrt_llm_statistics as statistics

LOAD = np.random.default_rng(1).integers(1, 90, (5, 3, 8))


def equal(trace: LoadTrace, load: np.ndarray) -> bool:
    return np.array_equal(trace.expert_load, load) and trace.phase.tolist() == [2] * len(load)


def test_statistics_are_summed_over_the_ranks(tmp_path: Path) -> None:
    trace = tensorrt_llm_statistics.read(statistics(tmp_path / "folder", LOAD, ep_size=4))
    assert equal(trace, LOAD)
    assert trace.metadata == {
        "num_experts_per_token": "4",
        "ep_size": "4",
        "first_iteration": "100",
        "first_moe_layer": "3",
    }


@pytest.mark.parametrize("ep_size", [1, 3])
def test_statistics_are_read_back(ep_size: int, tmp_path: Path) -> None:
    before = tensorrt_llm_statistics.read(statistics(tmp_path / "engine", LOAD))
    tensorrt_llm_statistics.write(tmp_path / "new" / "ours", before, ep_size=ep_size)
    after = tensorrt_llm_statistics.read(tmp_path / "new" / "ours")
    assert equal(after, LOAD)
    assert after.metadata == {**before.metadata, "ep_size": str(ep_size)}
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["ours"]
    # The library that the engine reads with takes our files too.
    ranks = [
        safetensors.numpy.load_file(tmp_path / "new" / "ours" / f"rank{rank}.safetensors")
        for rank in range(ep_size)
    ]
    assert ranks[0]["100_3"].dtype == np.int32
    assert np.array_equal(sum(rank["104_5"] for rank in ranks), LOAD[4, 2])


def test_counts_above_int32_are_read_back(tmp_path: Path) -> None:
    trace = LoadTrace(LOAD * 10**9, np.full(5, 2, dtype=np.uint8))
    tensorrt_llm_statistics.write(tmp_path / "folder", trace)
    assert equal(tensorrt_llm_statistics.read(tmp_path / "folder"), LOAD * 10**9)


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="expected a new folder"):
        tensorrt_llm_statistics.write(tmp_path, LoadTrace(LOAD, np.full(5, 2, dtype=np.uint8)))
    assert list(tmp_path.iterdir()) == []


def test_large_load_lies_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MAX_MEMORY_BYTES", 8)
    trace = tensorrt_llm_statistics.read(statistics(tmp_path / "folder", LOAD))
    assert isinstance(trace.expert_load, np.memmap) and equal(trace, LOAD)
    dump = sglang_recorder.read(sglang_stat_dump(tmp_path / "dump.pt", LOAD, buffer_size=9))
    assert isinstance(dump.expert_load, np.memmap) and equal(dump, LOAD)


STATISTICS_FAULTS = {
    "no meta": (lambda f: (f / "meta_info.json").unlink(), "meta_info.json: No such file"),
    "meta is a list": (lambda f: (f / "meta_info.json").write_text("[]"), "expected an object"),
    "no experts": (lambda f: (f / "meta_info.json").write_text("{}"), "num_experts: missing"),
    "true experts": (
        lambda f: (f / "meta_info.json").write_text('{"num_experts": true, "num_experts_per_token": 1}'),
        "num_experts: True",
    ),
    "a rank is missing": (lambda f: (f / "rank0.safetensors").unlink(), "rank0.safetensors: missing"),
    "no ranks": (lambda f: [(f / f"rank{r}.safetensors").unlink() for r in range(2)], "no rank<number>"),
    "no tensors": (lambda f: [save(f, r, {}) for r in range(2)], "no tensors"),
    "other names": (lambda f: save(f, 0, {"x": LOAD[0, 0]}), "'x': expected tensors named"),
    "same twice": (lambda f: save(f, 0, {"1_1": LOAD[0, 0], "01_1": LOAD[0, 0]}), "more than once"),
    "an iteration is missing": (
        lambda f: [save(f, r, {"1_1": LOAD[0, 0], "3_1": LOAD[0, 0]}) for r in range(2)],
        "iteration 2 is missing",
    ),
    "a layer is missing": (
        lambda f: [save(f, r, {"1_1": LOAD[0, 0], "1_2": LOAD[0, 0], "2_1": LOAD[0, 0]}) for r in range(2)],
        "2_2: missing",
    ),
    "shape": (lambda f: save(f, 1, {"100_3": LOAD[0, 0, :4]}), "100_3: I64 [4], expected I32 or I64 [8]"),
    "dtype": (lambda f: save(f, 1, {"100_3": LOAD[0, 0] * 1.0}), "100_3: F64 [8], expected"),
    "negative": (lambda f: save(f, 1, {"100_3": -LOAD[0, 0]}), "100_3[0]: -"),
    "no safetensors": (lambda f: (f / "rank1.safetensors").write_bytes(b"x" * 99), "no .safetensors file"),
    "a folder": (
        lambda f: ((f / "rank1.safetensors").unlink(), (f / "rank1.safetensors").mkdir()),
        "a folder, expected a file",
    ),
}


def save(folder: Path, rank: int, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, str(folder / f"rank{rank}.safetensors"))


@pytest.mark.parametrize("name", STATISTICS_FAULTS)
def test_faulty_statistics(name: str, tmp_path: Path) -> None:
    folder = statistics(tmp_path / "folder", LOAD)
    break_it, expected = STATISTICS_FAULTS[name]
    break_it(folder)
    with pytest.raises(RecordError) as error:
        tensorrt_llm_statistics.read(folder)
    assert expected in str(error.value)


def test_stat_dump_of_sglang(tmp_path: Path) -> None:
    path = sglang_stat_dump(tmp_path / "dump.pt", LOAD, dense_layers=3, buffer_size=100)
    trace = sglang_recorder.read(path)
    assert equal(trace, LOAD) and trace.metadata == {"first_moe_layer": "3"}


def test_dumps_of_a_folder_follow_each_other_in_time(tmp_path: Path) -> None:
    for moment, steps in (("1700000010.5", LOAD[3:]), ("999999999.25", LOAD[:3])):
        sglang_stat_dump(tmp_path / f"expert_distribution_recorder_{moment}.pt", steps)
    assert equal(sglang_recorder.read(tmp_path), LOAD)


def test_pass_dumps_of_sglang_are_summed_and_made_logical(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    physical_to_logical = np.stack([rng.permutation(np.arange(10) % 8) for _ in range(3)])
    trace = sglang_recorder.read(sglang_pass_dumps(tmp_path / "dumps", LOAD, physical_to_logical))
    assert equal(trace, LOAD)


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_dumps_are_read_back(suffix: str, tmp_path: Path) -> None:
    trace = LoadTrace(LOAD, np.full(5, 2, dtype=np.uint8), {"first_moe_layer": "2"})
    path = tmp_path / f"dump{suffix}"
    sglang_recorder.write(path, trace)
    found = sglang_recorder.read(path)
    assert equal(found, LOAD) and found.metadata == trace.metadata
    content = torch.load(path, weights_only=True) if suffix == ".pt" else json.loads(path.read_text())
    assert torch.as_tensor(content["logical_count"]).shape == (5, 5, 8)


def test_one_sum_for_all_steps_is_a_step(tmp_path: Path) -> None:
    path = tmp_path / "count.json"
    path.write_text(json.dumps({"logical_count": LOAD[0].tolist()}))
    assert equal(sglang_recorder.read(path), LOAD[:1])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "expected an object with logical_count"),
        ({}, "logical_count: missing"),
        ({"logical_count": [1, 2]}, "shape [2], expected [steps, layers, experts]"),
        ({"logical_count": [[[1], [2, 3]]]}, "ragged"),
        ({"logical_count": [[[1.5]]]}, "expected integers"),
        ({"logical_count": [[[1, True]]]}, "expected integers"),
        ({"logical_count": [[["1"]]]}, "expected integers"),
        ({"logical_count": [[[10**30]]]}, "expected"),
        ({"logical_count": [[[1], [-2]]]}, "logical_count[0][1][0]: -2, expected at least 0"),
        ({"logical_count": [[[0], [0]]]}, "no token in any step"),
        ({"records": 3, "last_physical_to_logical_map": [[0]]}, "records: 3, expected a list"),
        ({"records": []}, "last_physical_to_logical_map: missing"),
        ({"records": [], "last_physical_to_logical_map": [[0]]}, "no token"),
        ({"records": [], "last_physical_to_logical_map": [[5]]}, "expected ids of experts"),
        ({"records": [{}], "last_physical_to_logical_map": [[0]]}, "records[0].forward_pass_id: None"),
    ],
)
def test_faulty_dumps(content: object, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError) as error:
        sglang_recorder.read(path)
    assert expected in str(error.value)


def test_a_pt_dump_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    torch.save({"logical_count": torch.ones(1, dtype=torch.int32).expand(9, 9, 9)}, tmp_path / "dump.pt")
    with pytest.raises(RecordError, match="expected one whose elements are all in the file"):
        sglang_recorder.read(tmp_path / "dump.pt")


@pytest.mark.parametrize("format", ["tensorrt_llm", "pt", "json"])
@given(st.data())
def test_a_damaged_record_is_an_error_or_a_trace(
    format: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("traces")
    if format == "tensorrt_llm":
        path = statistics(folder / "statistics", LOAD[:2])
        damaged = path / data.draw(st.sampled_from(["meta_info.json", "rank1.safetensors"]))
    else:
        path = damaged = folder / f"dump.{format}"
        sglang_recorder.write(path, LoadTrace(LOAD[:2], np.full(2, 2, dtype=np.uint8)))
    content = bytearray(damaged.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        trace = formats.read_trace(path)
    except RecordError as error:
        assert "\n" not in str(error)
    else:
        assert trace.expert_load.ndim == 3 and trace.expert_load.min() >= 0


def test_formats_are_recognised(tmp_path: Path) -> None:
    trace = LoadTrace(LOAD, np.full(5, 2, dtype=np.uint8))
    load_trace.write(tmp_path / "trace.safetensors", trace)
    sglang_recorder.write(tmp_path / "dump.json", trace)
    sglang_stat_dump(tmp_path / "dump.pt", LOAD)
    statistics(tmp_path / "statistics", LOAD)
    found = {
        "trace.safetensors": "trace",
        "dump.json": "sglang",
        "dump.pt": "sglang",
        "statistics": "tensorrt_llm",
    }
    for name, format in found.items():
        assert formats.detect(tmp_path / name) == ("trace", format)
        assert equal(formats.read_trace(tmp_path / name), LOAD)
    (tmp_path / "map.json").write_text("[[0, 1]]")
    assert formats.detect(tmp_path / "map.json") == ("map", "vllm")
    with pytest.raises(RecordError, match=r"an expert map \(vllm\), expected recorded load"):
        formats.read_trace(tmp_path / "map.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="a folder without"):
        formats.detect(tmp_path / "empty")
