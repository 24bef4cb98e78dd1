"""`eplb convert`, `eplb validate` and `eplb compare` on the files of every engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eplb_platform.balance import balancedness, imbalance_ratio, moved_experts, rank_load
from eplb_platform.cli import run
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import formats, load_trace, tensorrt_llm_statistics
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology
from tests.unit.engine_files import sglang_stat_dump
from tests.unit.engine_files import tensorrt_llm_statistics as statistics

MAP = ExpertMap([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]], 4, Topology(2))
LOAD = np.random.default_rng(1).integers(1, 90, (6, 2, 4))
NAMES = {"vllm-ascend": "a.json", "tensorrt-llm": "t.yaml", "sglang": "s.pt", "vllm": "v.json"}


def done(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert not output.out and len(output.err.splitlines()) == 1
    return output.err


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_every_map_becomes_every_other(
    source: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / NAMES[source], tmp_path / "new" / NAMES[target]
    MAP.save(before, format=source.replace("-", "_"))
    found = json.loads(done(capsys, "convert", before, "-o", after, "--to", target, "--ep-size", 2, "--json"))
    assert ExpertMap.load(after, format=target.replace("-", "_"), topology=Topology(2)) == MAP
    assert (found["source_format"], found["output_format"]) == (
        source.replace("-", "_"),
        target.replace("-", "_"),
    )
    assert "valid: 2 layers, 4 experts + 2 redundant" in done(capsys, "validate", after, "--ep-size", 2)


def test_who_wants_a_map_of_load_is_told_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = sglang_stat_dump(tmp_path / "dump.pt", LOAD)
    said = refused(capsys, "convert", dump, "-o", tmp_path / "map.json", "--to", "vllm-ascend")
    assert said.count("convert:") == 1 and f"eplb plan {dump} -o {tmp_path / 'map.json'}" in said
    said = done(capsys, "convert", dump, "-o", tmp_path / "load.json")
    assert f"eplb plan {tmp_path / 'load.json'}" in said
    assert "(see eplb convert --help)" in refused(capsys, "convert", dump)


def test_dense_layers_come_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MAP.save(tmp_path / "a.json")
    sglang, back = tmp_path / "s.pt", tmp_path / "back.yaml"
    done(capsys, "convert", tmp_path / "a.json", "-o", sglang, "--first-moe-layer", 3)
    assert torch.load(sglang, weights_only=True)["physical_to_logical_map"].shape == (5, 6)
    done(capsys, "convert", sglang, "-o", back, "--first-moe-layer", 3, "--ep-size", 2)
    assert list(yaml.safe_load(back.read_text())["initial_global_assignments"]) == [3, 4]
    assert ExpertMap.load(back, topology=Topology(2)) == MAP


def test_every_record_becomes_every_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = statistics(tmp_path / "statistics", LOAD)
    for name in ("trace.safetensors", "dump.pt", "dump.json", "again"):
        done(capsys, "convert", path, "-o", tmp_path / name)
        path = tmp_path / name
        assert np.array_equal(formats.read_trace(path).expert_load, LOAD)
        assert "6 steps, 2 layers, 4 experts" in done(capsys, "validate", path)
    assert tensorrt_llm_statistics.read(path).metadata["first_moe_layer"] == "3"


def test_lost_phases_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_trace.write(tmp_path / "t.safetensors", LoadTrace(LOAD, np.array([0, 1] * 3, dtype=np.uint8)))
    assert "phases: they are lost" in done(
        capsys, "convert", tmp_path / "t.safetensors", "-o", tmp_path / "d.pt"
    )


def test_a_dump_becomes_a_vllm_ascend_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = sglang_stat_dump(tmp_path / "dump.pt", LOAD, dense_layers=3)
    output = tmp_path / "map.json"
    done(capsys, "plan", dump, "--ep-size", 2, "--num-slots", 6, "-o", output)
    assert "2 layers, 4 experts" in done(capsys, "validate", output, "--layers", 2, "--experts", 4)
    done(capsys, "plan", dump, "--ep-size", 2, "--num-slots", 6, "-o", tmp_path / "map.yaml")
    planned = yaml.safe_load((tmp_path / "map.yaml").read_text())
    assert list(planned["initial_global_assignments"]) == [3, 4]


def test_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MAP.save(tmp_path / "a.json")
    dump = sglang_stat_dump(tmp_path / "dump.pt", LOAD)
    assert "recorded load: give --to" in refused(capsys, "convert", dump, "-o", tmp_path / "map.yaml")
    assert "unknown format 'x'" in refused(capsys, "convert", dump, "-o", tmp_path / "b.json", "--to", "x")
    assert "--to, one of vllm-ascend" in refused(
        capsys, "convert", tmp_path / "a.json", "-o", tmp_path / "b.bin"
    )
    assert "expected 3 ranks" in refused(
        capsys, "convert", tmp_path / "a.json", "-o", tmp_path / "b.yaml", "--ep-size", 3
    )
    MAP.save(tmp_path / "t.yaml")
    assert "--ep-size" in refused(capsys, "convert", tmp_path / "t.yaml", "-o", tmp_path / "b.json")
    assert "No such file" in refused(capsys, "convert", tmp_path / "no.json", "-o", tmp_path / "b.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "dump.pt", "t.yaml"]


def test_every_fault_of_a_yaml_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("num_slots: 2\ninitial_global_assignments: {3: [0, 1], 4: [0, -1], 5: [1, 1]}\n")
    assert run(["validate", str(path), "--ep-size", "2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{path}: initial_global_assignments.4[1]: -1" in lines[0]
    assert f"{path}: initial_global_assignments.5: no slot holds expert 0" in lines[1]


def test_validate_counts_layers_of_any_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MAP.save(tmp_path / "t.yaml")
    assert "2 layers, expected 3" in refused(
        capsys, "validate", tmp_path / "t.yaml", "--ranks", 2, "--layers", 3
    )
    dump = sglang_stat_dump(tmp_path / "dump.pt", LOAD)
    assert "4 logical experts, expected 5" in refused(capsys, "validate", dump, "--experts", 5)


def test_maps_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ExpertMap([[0, 1, 2, 0, 1, 3], [3, 2, 1, 0, 3, 1]], 4, Topology(2))
    MAP.save(tmp_path / "a.json")
    other.save(tmp_path / "b.yaml")
    dump = sglang_stat_dump(tmp_path / "dump.pt", LOAD, dense_layers=3)
    arguments = ["compare", tmp_path / "a.json", tmp_path / "b.yaml", dump, "--ep-size", 2]
    found = json.loads(done(capsys, *arguments, "--json"))
    for name, expert_map in (("a", MAP), ("b", other)):
        load = rank_load(expert_map, LOAD)
        expected = imbalance_ratio(load).mean(axis=0)
        assert [layer[f"imbalance_ratio_{name}"] for layer in found["layers"]] == pytest.approx(expected)
        # Over the steps: the time that the mean rank works / the time that the hottest does.
        expected = load.mean(axis=2).sum(axis=0) / load.max(axis=2).sum(axis=0)
        assert [layer[f"balancedness_{name}"] for layer in found["layers"]] == pytest.approx(expected)
        assert balancedness(load).shape == (6, 2)
    assert [layer["moved_experts"] for layer in found["layers"]] == moved_experts(MAP, other).tolist()
    assert [layer["layer"] for layer in found["layers"]] == [3, 4]
    lines = done(capsys, *arguments).splitlines()
    assert lines[4].split()[0] == "3" and lines[6].split()[0] == "average"


def test_maps_that_do_not_fit_the_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MAP.save(tmp_path / "a.json")
    ExpertMap.initial(3, 4, Topology(2)).save(tmp_path / "b.json")
    dump = sglang_stat_dump(tmp_path / "dump.pt", LOAD)
    message = refused(capsys, "compare", tmp_path / "a.json", tmp_path / "b.json", dump)
    assert "b.json) has [layers, experts] [3, 4], the load has [2, 4]" in message
    assert "expected recorded load" in refused(
        capsys, "compare", tmp_path / "a.json", tmp_path / "b.json", tmp_path / "a.json"
    )
