"""Maps in the formats of TensorRT-LLM, SGLang and vLLM: their own samples, round trips, faults, fuzz."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import RecordError, sglang_location, tensorrt_llm_yaml, vllm_map
from eplb_platform.topology import Topology
from tests.unit.strategies import expert_maps, topologies

ROWS = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]
KNOWN = ExpertMap(ROWS, 4, Topology(2))
SLOTS, ASSIGNED = "num_slots: 2\n", "initial_global_assignments: "
SUFFIX = {"tensorrt_llm": ".yaml", "sglang": ".json", "vllm": ".json"}
MODULE: dict[str, Any] = {
    "tensorrt_llm": tensorrt_llm_yaml,
    "sglang": sglang_location,
    "vllm": vllm_map,
}


def engine_sample(format: str, rows: list[list[int]]) -> str:
    """As the engine's own tools print it."""
    if format == "tensorrt_llm":
        assignments = "".join(f"  {3 + i}: {row}\n" for i, row in enumerate(rows))
        slots = f"num_slots: {len(rows[0])}\n"
        return f"initial_global_assignments:\n{assignments}layer_updates_per_iter: 0\n{slots}"
    return json.dumps({"physical_to_logical_map": rows} if format == "sglang" else rows)


@pytest.mark.parametrize("format", SUFFIX)
def test_a_known_file_is_read(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"map{SUFFIX[format]}"
    path.write_text(engine_sample(format, ROWS))
    assert ExpertMap.load(path, format=format, topology=Topology(2)) == KNOWN
    assert MODULE[format].faults(path, num_logical_experts=4, topology=Topology(2)) == []


@pytest.mark.parametrize("format", SUFFIX)
def test_the_number_of_ranks_is_asked_for(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"map{SUFFIX[format]}"
    KNOWN.save(path, format=format)
    with pytest.raises(RecordError, match=r"does not say how many ranks.*--ep-size"):
        ExpertMap.load(path, format=format)
    with pytest.raises(RecordError, match="6 slots, expected a multiple of 4 ranks"):
        ExpertMap.load(path, format=format, topology=Topology(4))


@pytest.mark.parametrize("format", SUFFIX)
@given(st.data())
def test_what_is_written_is_read_back(
    format: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    expert_map = data.draw(expert_maps(topology=data.draw(topologies(inactive=False))))
    path = tmp_path_factory.mktemp("maps") / f"map{SUFFIX[format]}"
    expert_map.save(path, format=format)
    assert ExpertMap.load(path, format=format, topology=expert_map.topology) == expert_map
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_formats_are_chosen_by_suffix(tmp_path: Path) -> None:
    for suffix in (".yaml", ".yml", ".pt"):
        path = tmp_path / f"map{suffix}"
        KNOWN.save(path)
        assert ExpertMap.load(path, topology=Topology(2)) == KNOWN


def test_tensorrt_llm_gets_only_keys_that_it_takes_and_the_numbers_of_its_layers(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    tensorrt_llm_yaml.write(path, KNOWN, first_moe_layer=3)
    assert yaml.safe_load(path.read_text()) == {
        "initial_global_assignments": {3: ROWS[0], 4: ROWS[1]},
        "num_slots": 6,
        "layer_updates_per_iter": 0,
    }


def test_ep_size_of_an_early_release_counts(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(engine_sample("tensorrt_llm", ROWS) + "ep_size: 2\n")
    assert ExpertMap.load(path) == KNOWN
    with pytest.raises(RecordError, match="ep_size: 2, expected 3 ranks"):
        ExpertMap.load(path, topology=Topology(3))


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_sglang_has_rows_for_dense_layers(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"map{suffix}"
    sglang_location.write(path, KNOWN, first_moe_layer=1)
    content = torch.load(path, weights_only=True) if suffix == ".pt" else json.loads(path.read_text())
    rows = torch.as_tensor(content["physical_to_logical_map"]).tolist()
    assert rows == [[0, 1, 2, 3, 0, 1], *ROWS] and list(content) == ["physical_to_logical_map"]
    assert sglang_location.read(path, topology=Topology(2), first_moe_layer=1) == KNOWN
    with pytest.raises(RecordError, match="3 layers, expected rows for more than 3"):
        sglang_location.read(path, topology=Topology(2), first_moe_layer=3)


@pytest.mark.parametrize(
    ("format", "content", "expected"),
    [
        ("tensorrt_llm", "", "None, expected a mapping"),
        ("tensorrt_llm", "a: [", "line 2, column 1: no valid YAML"),
        ("tensorrt_llm", "num_slots: 2\nlayer_updates_per_iter: 2", "without a map"),
        ("tensorrt_llm", "num_slots: 2\nnum_slots: 2", "more than once"),
        ("tensorrt_llm", "a: &x [1]\nb: *x", "line 2: an alias"),
        ("tensorrt_llm", "[" * 100_000, "nested too deeply"),
        ("tensorrt_llm", "num_slots: " + "9" * 9000, "no valid YAML"),
        ("tensorrt_llm", "num_slots: 2001-99-99", "no valid YAML"),
        ("tensorrt_llm", "num_slots: 3\n" + ASSIGNED + "{3: [0, 1]}", "2 slots, expected num_slots (3)"),
        ("tensorrt_llm", SLOTS + ASSIGNED + "{'3': [0, 1]}", "number of a layer"),
        ("tensorrt_llm", SLOTS + ASSIGNED + "{3: [0, 1]}\nx: 1", "'x': an unknown key"),
        ("tensorrt_llm", SLOTS + ASSIGNED + "{3: [0, 2]}", "assignments.3[1]: 3 experts"),
        ("tensorrt_llm", SLOTS + ASSIGNED + "{3: [0, true]}", "assignments.3[1]: True"),
        ("tensorrt_llm", SLOTS + ASSIGNED + "!!python/object/apply:os.abort []", "no valid"),
        ("sglang", "[[0, 1]]", "physical_to_logical_map: missing"),
        ("sglang", '{"physical_to_logical_map": [[0, 1], [0]]}', "physical_to_logical_map[1]: 1 slots"),
        ("sglang", '{"physical_to_logical_map": [[0, -1]]}', "-1, expected an expert from 0 to 0"),
        ("sglang", '{"physical_to_logical_map": [[0, 1]], "x": 1}', "'x': an unknown key"),
        ("sglang", '{"physical_to_logical_map": [[0, 1], [0, 0]]}', "[1]: no slot holds expert 1"),
        ("sglang", '{"physical_to_logical_map": 3}', "expected rows"),
        ("vllm", "[0, 1]", "one list for all layers"),
        ("vllm", "{}", "expected a list of experts for each layer"),
        ("vllm", "[[0, 1.0]]", "[0][1]: 1.0, expected the id of an expert"),
        ("vllm", "[[0, 99999999999999999999]]", "too many digits"),
        ("vllm", "[[], []]", "[0]: [], expected a list"),
    ],
)  # fmt: skip
def test_faults_are_named_with_their_place(format: str, content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / f"map{SUFFIX[format]}"
    path.write_text(content)
    faults = [str(fault) for fault in MODULE[format].faults(path, topology=Topology(1))]
    assert any(expected in fault for fault in faults), faults
    with pytest.raises(RecordError):
        MODULE[format].read(path, topology=Topology(1))


def test_inactive_ranks_cannot_be_written(tmp_path: Path) -> None:
    expert_map = ExpertMap.initial(1, 2, Topology(3, active_ranks=(0, 2)))
    for format, suffix in SUFFIX.items():
        path = tmp_path / f"map{suffix}"
        with pytest.raises(RecordError, match="inactive ranks"):
            expert_map.save(path, format=format)
        assert not path.exists()


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("harmed"),)  # type: ignore[return-value]


def test_nothing_in_a_pt_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"physical_to_logical_map": _Harmful()}, "map.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(_Harmful()))
    for name in ("map.pt", "pickle.pt"):
        with pytest.raises(RecordError):
            ExpertMap.load(name, topology=Topology(1))
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"physical_to_logical_map": torch.zeros(1).expand(1, 1 << 40)},
        {"physical_to_logical_map": torch.zeros(1, dtype=torch.int64).expand(1 << 20, 1 << 20)},
        {"physical_to_logical_map": torch.tensor([[0.0, 1.0]])},
        {"physical_to_logical_map": torch.tensor([[False, True]])},
        {"physical_to_logical_map": torch.tensor([[0, 1]]).to_sparse()},
        {"physical_to_logical_map": torch.zeros(1, 2, dtype=torch.int64, device="meta")},
        {"physical_to_logical_map": None},
    ],
)
def test_a_pt_file_without_a_map(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "map.pt")
    with pytest.raises(RecordError):
        ExpertMap.load(tmp_path / "map.pt", topology=Topology(1))


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "map.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("map/data.pkl", b"\0" * (1 << 26))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(RecordError, match="compressed, expected an uncompressed member"):
        ExpertMap.load(path, topology=Topology(1))


@pytest.mark.parametrize("name", ["map.yaml", "map.pt", "sglang.json", "vllm.json"])
@given(st.data())
def test_a_damaged_file_is_an_error_or_a_map(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("maps") / name
    format = {"map.yaml": "tensorrt_llm", "vllm.json": "vllm"}.get(name, "sglang")
    KNOWN.save(path, format=format)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = ExpertMap.load(path, format=format, topology=Topology(2))
    except RecordError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found, ExpertMap)


def test_paths_that_hold_no_file(tmp_path: Path) -> None:
    link = tmp_path / "loop.yaml"
    link.symlink_to(link)
    for path in (link, tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(RecordError):
            ExpertMap.load(path, format="tensorrt_llm", topology=Topology(1))


def test_large_maps_take_a_moment(tmp_path: Path) -> None:
    rows = np.stack([np.random.default_rng(i).permutation(np.arange(288) % 256) for i in range(58)])
    expert_map = ExpertMap(rows, 256, Topology(36))
    for format, suffix in SUFFIX.items():
        expert_map.save(tmp_path / f"map{suffix}", format=format)
        path = tmp_path / f"map{suffix}"
        assert ExpertMap.load(path, format=format, topology=Topology(36)) == expert_map
