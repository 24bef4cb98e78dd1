"""The offline commands on numbers and places that would fill the memory or destroy what they read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eplb_platform.cli import advising, run
from eplb_platform.limits import MOST_RANKS
from eplb_platform.records import load_trace
from eplb_platform.records.atomic import write_atomically
from eplb_platform.records.formats import read_trace
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

STEPS, LAYERS, EXPERTS = 40, 2, 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With load.safetensors and map.json for four ranks, where the commands run."""
    monkeypatch.chdir(tmp_path)
    load = np.random.default_rng(4).poisson(30, (STEPS, LAYERS, EXPERTS)).astype(np.int32)
    write_load(load)
    assert run(["plan", "load.safetensors", "--ep-size", "4", "--num-slots", "8", "-o", "map.json"]) == 0
    return tmp_path


def write_load(load: np.ndarray) -> None:
    load_trace.write("load.safetensors", LoadTrace(load, np.ones(len(load), dtype=np.uint8), {}))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize(
    "arguments",
    [
        "convert map.json -o map.json --to sglang",
        "convert map.json -o link.json --to sglang",
        "convert load.safetensors -o load.safetensors",
        "convert dump.pt -o dump.pt",
        "plan dump.pt --ep-size 4 --num-slots 8 -o dump.pt",
        "plan load.safetensors --ep-size 4 --num-slots 8 --compute-cost cost.json -o cost.json",
        "report load.safetensors --ep-size 4 --html load.safetensors",
        "report load.safetensors --map map.json --plot map.json",
        "report statistics --html statistics/rank0.safetensors",
        "simulate load.safetensors --ep-size 4 --map map.json --plot map.json",
    ],
)
def test_no_input_is_replaced(arguments: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "link.json").symlink_to("map.json")
    (folder / "cost.json").write_text(json.dumps([[1.0] * EXPERTS] * LAYERS))
    assert run(["convert", "load.safetensors", "-o", "dump.pt"]) == 0
    assert run(["convert", "load.safetensors", "-o", "statistics"]) == 0
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert "would replace the input" in refused(arguments.split(), capsys)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_the_map_in_use_may_be_replaced(folder: Path) -> None:
    assert run(["plan", "load.safetensors", "--current", "map.json", "-o", "map.json"]) == 0


def test_a_page_and_a_picture_are_two_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "report load.safetensors --ep-size 4 --html page.png --plot page.png"
    assert "expected two files" in refused(command.split(), capsys)
    assert not (folder / "page.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "report load.safetensors --ep-size 1099511627776",
        "plan load.safetensors --ep-size 8 --num-slots 1099511627776 -o new.json",
        "plan load.safetensors --ep-size 8 --num-slots 8 --num-nodes 1099511627776 -o new.json",
        "simulate load.safetensors --ep-size 1099511627776",
        "simulate load.safetensors --ep-size 4 --redundant-experts 1099511627776",
        "simulate load.safetensors --ep-size 4 --planning-time inf",
        "advise load.safetensors --memory inf",
        "convert map.json -o new.pt --first-moe-layer 1099511627776",
        "convert map.json -o new.pt --ep-size 1099511627776",
        "compare map.json map.json load.safetensors --ep-size 1099511627776",
        "validate map.json --ep-size 1099511627776",
    ],
)
def test_numbers_beyond_any_deployment(
    arguments: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(arguments.split(), capsys)
    assert not list(folder.glob("new.*"))


def test_ranks_are_counted_before_they_are_listed() -> None:
    with pytest.raises(ValueError, match=f"expected at most {MOST_RANKS}"):
        Topology(1 << 60)


def test_the_system_s_reason_names_the_file_that_was_asked_for() -> None:
    with pytest.raises(OSError) as caught:
        write_atomically("/proc/page.html", b"")
    assert caught.value.filename == "/proc/page.html"


def test_what_a_dump_loses_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = np.full((STEPS, LAYERS, EXPERTS), 3, dtype=np.int32)
    load[:, 0] = 0
    load[10:15] = 0
    write_load(load)
    capsys.readouterr()
    assert run(["convert", "load.safetensors", "-o", "dump.pt"]) == 0
    said = capsys.readouterr().out
    assert "5 steps have no tokens" in said and "the first 1 layers have no tokens" in said
    assert read_trace("dump.pt").expert_load.shape == (STEPS - 5, LAYERS - 1, EXPERTS)
    write_load(np.zeros_like(load))
    assert "no token in any step" in refused(["convert", "load.safetensors", "-o", "none.pt"], capsys)
    assert not (folder / "none.pt").exists()


@pytest.mark.parametrize("name", ["map.json", "map.yaml"])
def test_a_file_for_more_ranks_than_any_deployment_is_named(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = MOST_RANKS + 1
    devices = [{"device_id": device, "device_expert": [0]} for device in range(ranks)]
    layer = {"layer_id": 0, "device_count": ranks, "device_list": devices}
    content = {
        "map.json": json.dumps({"moe_layer_count": 1, "layer_list": [layer]}),
        "map.yaml": f"initial_global_assignments: {{3: [0, 1]}}\nnum_slots: 2\nep_size: {ranks}\n",
    }
    Path(name).write_text(content[name])
    assert run(["validate", name]) == 2
    said = "".join(capsys.readouterr())
    assert f"{name}: " in said and f"at most {MOST_RANKS}" in said


def test_a_trace_too_short_for_a_cycle_is_told_from_balancing_that_gains_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["simulate", "load.safetensors", "--ep-size", "4"]) == 0
    assert "adaptive: no cycle was completed" in capsys.readouterr().out
    assert run(["advise", "load.safetensors", "--ep-size", "4"]) == 0
    said = capsys.readouterr().out
    assert "in which no cycle was completed" in said and "hardly drifts" not in said


def test_fewer_experts_than_the_least_of_the_usual_ep_sizes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_load(np.random.default_rng(5).poisson([5, 50, 500], (STEPS, LAYERS, 3)).astype(np.int32))
    capsys.readouterr()
    assert run(["advise", "load.safetensors", "--json"]) == 0
    assert {choice["ep_size"] for choice in json.loads(capsys.readouterr().out)["choices"]} == {3}


def test_an_advised_choice_that_others_beat_is_explained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = np.ones((120, 3, 16), dtype=np.int32)
    load[:, :, 5] = 1_000_000
    write_load(load)
    capsys.readouterr()
    assert run(["advise", "load.safetensors", "--memory", "3", "--ep-size", "4,8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (chosen,) = [choice for choice in found["choices"] if choice["chosen"]]
    assert not chosen["on_pareto_front"] and "Others beat it in memory" in found["reasons"][0]


def test_what_other_engines_are_told_fits_the_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["advise", "load.safetensors", "--ep-size", "4"]
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    commands = json.loads(capsys.readouterr().out)["commands"]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert commands["sglang"] in said and commands["tensorrt_llm"] in said
    plan = commands["plan"].split()[1:]
    for output, place in (("map.pt", "sglang"), ("map.yaml", "tensorrt_llm")):
        assert run([*plan[:-1], output]) == 0
        told = capsys.readouterr().out.splitlines()[-1]
        assert commands[place] in told


def test_other_engines_balance_as_often_as_is_advised(folder: Path) -> None:
    outcome = advising.run(advising.Request(Path("load.safetensors"), ep_sizes=("4",)), lambda *_: None)
    dynamic = replace(outcome, advice=replace(outcome.advice, interval=300))
    redundant = outcome.advice.chosen.redundant_experts
    assert dynamic.sglang_flags() == (
        f"--ep-size 4 --ep-num-redundant-experts {redundant} "
        "--enable-eplb --eplb-rebalance-num-iterations 300"
    )
    assert f"{{num_slots: {EXPERTS + redundant}, layer_updates_per_iter: 1}}" in (
        dynamic.tensorrt_llm_configuration()
    )


def test_one_rank_has_nothing_to_deploy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["advise", "load.safetensors", "--ep-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "One rank has nothing to balance" in said and "--additional-config" not in said


def test_maps_that_say_their_ranks_are_compared_with_those_that_do_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", "load.safetensors", "--ep-size", "2", "--num-slots", "8", "-o", "two.yaml"]
    assert run(plan) == 0
    capsys.readouterr()
    assert run(["compare", "map.json", "two.yaml", "load.safetensors", "--ep-size", "2"]) == 0
    said = capsys.readouterr().out
    assert "map.json, 4 ranks of 2 slots" in said and "two.yaml, 2 ranks of 4 slots" in said
