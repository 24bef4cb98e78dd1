"""The command's answers to right and wrong input: exit codes, one line on standard error, clean JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from eplb_platform.cli import run
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

Faulty = Callable[[dict[str, Any]], object]

# The format's known answer: 8 experts and 2 redundant ones on 2 ranks.
KNOWN = {
    "moe_layer_count": 2,
    "layer_list": [
        {
            "layer_id": layer,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [7, 2, 0, 3, 5]},
                {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]},
            ],
        }
        for layer in range(2)
    ],
}


def written(folder: Path, content: object) -> str:
    path = folder / "map.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def device(document: dict[str, Any], layer: int, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = document["layer_list"][layer]["device_list"][rank]
    return found


def test_help_is_printed_without_what_commands_need() -> None:
    """`eplb --help` stays quick because it imports no numbers, no torch, no models."""
    heavy = ("torch", "numpy", "numba", "transformers", "matplotlib", "pydantic")
    program = (
        "import sys; from eplb_platform.cli import run; code = run(['--help']);"
        f"sys.exit(code or [name for name in {heavy!r} if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("demo", "backends", "validate"))


@pytest.mark.parametrize("command", [[], ["demo"], ["backends"], ["validate"]])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    assert "--help" in capsys.readouterr().out


def test_backends_names_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["backends"]) == 0
    assert "cpu" in capsys.readouterr().out


def test_backends_json_is_all_there_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["backends", "--json"]) == 0
    reports = {report["name"]: report for report in json.loads(capsys.readouterr().out)}
    assert reports["cpu"]["usable"] is True
    assert reports["cpu"]["collective"] == "gloo"
    assert "torch" in reports["cpu"]["versions"]


def test_sound_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ranks", "2", "--experts", "8", "--layers", "2"]
    assert run(["validate", written(tmp_path, KNOWN), *options]) == 0
    output = capsys.readouterr()
    assert "8 experts + 2 redundant, 2 ranks of 5 slots" in output.out
    assert not output.err


def test_sound_map_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "map.json"
    ExpertMap.initial(3, 16, Topology(4), 4).save(path)
    assert run(["validate", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["valid"] is True and found["faults"] == []
    assert (found["layers"], found["ranks"], found["slots_per_rank"], found["redundant_experts"]) == (
        3,
        4,
        5,
        4,
    )


FAULTS: dict[str, tuple[Faulty, str]] = {
    "missing expert": (lambda d: device(d, 1, 0)["device_expert"].__setitem__(2, 3), "layer_list[1]"),
    "wrong device_count": (lambda d: d["layer_list"][0].update(device_count=3), "device_count"),
    "wrong moe_layer_count": (lambda d: d.update(moe_layer_count=5), "moe_layer_count"),
    "a layer twice": (lambda d: d["layer_list"][1].update(layer_id=0), "layer_id"),
    "a device twice": (lambda d: device(d, 0, 1).update(device_id=0), "device_id"),
    "minus one": (lambda d: device(d, 1, 1)["device_expert"].__setitem__(0, -1), "device_expert[0]"),
    "float id": (lambda d: device(d, 0, 0)["device_expert"].__setitem__(1, 2.0), "device_expert[1]"),
    "true as id": (lambda d: device(d, 0, 0)["device_expert"].__setitem__(1, True), "device_expert[1]"),
    "text as id": (lambda d: device(d, 0, 0)["device_expert"].__setitem__(1, "2"), "device_expert[1]"),
    "ragged rows": (lambda d: device(d, 0, 1)["device_expert"].append(0), "device_list[1]"),
    "no layers": (lambda d: d.pop("layer_list"), "layer_list"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_with_its_place(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, place = FAULTS[name]
    document = deepcopy(KNOWN)
    break_it(document)
    assert run(["validate", written(tmp_path, document)]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert place in output.err


def test_all_faults_are_listed_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = deepcopy(KNOWN)
    device(document, 0, 0)["device_expert"][0] = 2.5
    device(document, 1, 1)["device_expert"][4] = -1
    document["moe_layer_count"] = 7
    assert run(["validate", written(tmp_path, document)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    for place in ("layer_list[0].device_list[0]", "layer_list[1].device_list[1]", "moe_layer_count"):
        assert any(place in line for line in lines)


def test_faults_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = deepcopy(KNOWN)
    device(document, 1, 1)["device_expert"][0] = -1
    assert run(["validate", written(tmp_path, document), "--json"]) == 2
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["valid"] is False and not output.err
    assert "layer_list[1].device_list[1].device_expert[0]" in [fault["place"] for fault in found["faults"]]


@pytest.mark.parametrize(
    "options", [["--ranks", "4"], ["--experts", "9"], ["--experts", "7"], ["--layers", "3"]]
)
def test_map_for_something_else(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["validate", written(tmp_path, KNOWN), *options]) == 2
    assert f"expected {options[1]}" in capsys.readouterr().err or options == ["--experts", "7"]


@pytest.mark.parametrize(
    "content", ["", "{", json.dumps(KNOWN)[:100], "[]", "NaN", "\x00", '{"layer_list": 3}']
)
def test_what_is_no_map_at_all(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, content)
    assert run(["validate", path]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith(path) for line in lines)


def test_paths_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "absent.json", tmp_path / "absent" / "map.json", tmp_path / "a\nb"):
        assert run(["validate", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["validate"],
        ["validate", "a.json", "b.json"],
        ["validate", "a.json", "--ranks", "many"],
        ["validate", "a.json", "--ranks", "0"],
        ["backends", "--jsn"],
        ["demo", "--ranks"],
        ["demo", "--seed", "1.5"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert not output.out
    assert len(output.err.splitlines()) == 1 and output.err.startswith("eplb: ")


@pytest.mark.parametrize(
    "command", [[str(Path(sys.executable).parent / "eplb")], [sys.executable, "-m", "eplb_platform.cli"]]
)
def test_the_command_itself(command: list[str], tmp_path: Path) -> None:
    """One true process: what the shell sees of bad input."""
    command = [*command, "validate", str(tmp_path / "absent.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
