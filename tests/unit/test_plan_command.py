"""`eplb plan`: traces in, map and summary out; what it says of input that cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eplb_platform.algorithms import rebalance_experts
from eplb_platform.balance import lower_bound, moved_experts, window_balancedness
from eplb_platform.cli import run
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import load_trace
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

STEPS, LAYERS, EXPERTS = 6, 3, 16
TRACES = Path(__file__).parents[2].parent / "shared" / "traces"


def skewed(seed: int = 0, steps: int = STEPS, experts: int = EXPERTS) -> np.ndarray:
    return np.random.default_rng(seed).zipf(1.6, (steps, LAYERS, experts)).clip(max=1000).astype(np.int64)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return written(tmp_path / "trace.safetensors", skewed())


def written(path: Path, load: np.ndarray, phase: list[int] | None = None) -> Path:
    phases = np.array(phase or [2] * len(load), dtype=np.uint8)
    load_trace.write(path, LoadTrace(load, phases, {}))
    return path


def planned(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert run(["plan", *map(str, arguments), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["plan", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert not output.out and len(output.err.splitlines()) == 1
    return output.err


def test_it_writes_the_map_that_the_library_plans(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "map.json"
    options = ["--ep-size", 4, "--num-slots", 20, "--num-nodes", 2, "--num-expert-groups", 4]
    found = planned([trace, *options, "--algorithm", "deepseek", "-o", path], capsys)
    topology = Topology(4, 2)
    load = skewed().astype(np.float64)
    plan = rebalance_experts(
        load, num_physical_experts=20, topology=topology, num_expert_groups=4, algorithm="deepseek"
    )
    assert ExpertMap.load(path, topology=topology) == plan.expert_map
    before = window_balancedness(ExpertMap.initial(LAYERS, EXPERTS, topology, 4), load)
    assert found["layers"] == [
        {"before": before[i], "after": plan.balancedness[i], "bound": bound, "moved_experts": moved}
        for i, (bound, moved) in enumerate(
            zip(1 / lower_bound(load, 20, topology, 4), plan.moved_experts, strict=True)
        )
    ]
    assert found["algorithm"] == "deepseek" and found["output"] == str(path)
    assert found["moved_experts"] == plan.moved_experts.sum()


def test_the_table_has_a_line_for_each_layer_and_the_whole(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(trace), "--ep-size", "4", "--num-slots", "20", "-o", str(tmp_path / "map.json")]
    assert run(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "before", "after", "bound", "moved"]
    assert [line.split()[0] for line in lines[1:6]] == ["0", "1", "2", "mean", "worst"]
    rows = np.array([[float(number) for number in line.split()[1:]] for line in lines[1:6]])
    np.testing.assert_allclose(rows[3], rows[:3].mean(axis=0), atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(rows[4, :3], rows[:3, :3].min(axis=0))
    assert "experts moved, planned in" in lines[-2]
    assert f'{{"eplb_config": {{"expert_map_path": "{tmp_path / "map.json"}"}}}}' in lines[-1]


def test_a_map_in_use_gives_ranks_and_slots_and_is_what_is_compared_with(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current, path = tmp_path / "current.json", tmp_path / "map.json"
    held = ExpertMap.round_robin(LAYERS, EXPERTS, Topology(4), 4)
    held.save(current)
    found = planned([trace, "--current", current, "-o", path], capsys)
    after = ExpertMap.load(path)
    assert found["moved_experts"] == moved_experts(held, after).sum()
    layers = found["layers"]
    assert isinstance(layers, list)
    np.testing.assert_array_equal([layer["before"] for layer in layers], window_balancedness(held, skewed()))


def test_traces_follow_each_other_and_are_summed_into_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(tmp_path / "a.safetensors", skewed(1, 8))
    second = written(tmp_path / "b.safetensors", skewed(2, 4))
    path = tmp_path / "map.json"
    options = ["--ep-size", 4, "--num-slots", 20, "--windows", 3]
    found = planned([first, second, *options, "-o", path], capsys)
    windows = np.stack([skewed(1, 8)[:4].sum(0), skewed(1, 8)[4:].sum(0), skewed(2, 4).sum(0)])
    layers = found["layers"]
    assert isinstance(layers, list)
    np.testing.assert_allclose(
        [layer["after"] for layer in layers], window_balancedness(ExpertMap.load(path), windows)
    )


def test_steps_of_the_other_phase_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = skewed(3, 6)
    trace = written(tmp_path / "trace.safetensors", load, [0, 1, 2, 0, 1, 0])
    path = tmp_path / "map.json"
    options = ["--ep-size", 4, "--num-slots", 20, "--phase", "decode"]
    found = planned([trace, *options, "-o", path], capsys)
    layers = found["layers"]
    assert isinstance(layers, list)
    np.testing.assert_allclose(
        [layer["after"] for layer in layers], window_balancedness(ExpertMap.load(path), load[[1, 2, 4]])
    )
    only_prefill = written(tmp_path / "prefill.safetensors", load, [0] * 6)
    assert "no steps of phase 'decode'" in refused([only_prefill, *options, "-o", path], capsys)


def test_options_go_to_the_algorithm(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.json"
        options = ["--ep-size", 4, "--num-slots", 20, "--algorithm", "random", "--option", f"seed={seed}"]
        planned([trace, *options, "-o", path], capsys)
        maps.append(ExpertMap.load(path))
    expected = rebalance_experts(
        skewed(), num_physical_experts=20, topology=Topology(4), algorithm="random", seed=2
    )
    assert maps[0] != maps[1] == expected.expert_map


SLOTS = ["--ep-size", "4", "--num-slots", "20"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ep-size and --num-slots"),
        (["--ep-size", "4"], "--ep-size and --num-slots"),
        (["--ep-size", "4", "--num-slots", "19"], "multiple of the 4 ranks"),
        (["--ep-size", "4", "--num-slots", "12"], "do not fit"),
        (["--ep-size", "4", "--num-slots", "20", "--num-nodes", "5"], "num_nodes is 5"),
        ([*SLOTS, "--num-expert-groups", "3"], "num_expert_groups is 3"),
        ([*SLOTS, "--algorithm", "deepsek"], "did you mean 'deepseek'"),
        ([*SLOTS, "--algorithm", "random", "--option", "sed=1"], "no option 'sed'"),
        ([*SLOTS, "--algorithm", "random", "--option", "seed=x"], "seed is 'x'"),
        ([*SLOTS, "--option", "seed"], "expected key=value"),
        ([*SLOTS, "--option", "topology=1"], "no option of an algorithm"),
        ([*SLOTS, "--phase", "idle"], "idle"),
        ([*SLOTS, "--current", "absent.json"], "absent.json"),
        ([*SLOTS, "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    arguments: list[object], message: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "map.json"
    assert message in refused([trace, *arguments, "-o", path], capsys)
    assert not path.exists()


def test_traces_of_two_models_are_refused(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = written(tmp_path / "other.safetensors", skewed(experts=8))
    message = refused([trace, other, *SLOTS, "-o", tmp_path / "map.json"], capsys)
    assert "other.safetensors has [layers, experts] [3, 8]" in message


def test_a_map_of_another_model_or_group_is_refused(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current = tmp_path / "current.json"
    ExpertMap.initial(LAYERS + 1, EXPERTS, Topology(4), 4).save(current)
    arguments = [trace, "--current", current, "-o", tmp_path / "map.json"]
    assert "4 layers" in refused(arguments, capsys)
    assert "current.json" in refused([*arguments, "--ep-size", 8], capsys)


def test_a_place_that_cannot_be_written_is_said(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "suffix" in refused([trace, *SLOTS, "-o", tmp_path / "map.txt"], capsys)
    assert "trace.safetensors" in refused([trace, *SLOTS, "-o", trace / "map.json"], capsys)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded loads are not here")
def test_recorded_loads_are_planned_close_to_their_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (
        TRACES / f"deepseek_r1_decode_{mix}.safetensors" for mix in ("in1000out1000", "in1800out100")
    )
    options = ["--ep-size", 32, "--num-slots", 288, "--algorithm", "deepseek"]
    cold = planned([first, *options, "-o", tmp_path / "a.json"], capsys)
    again = planned([second, *options, "--current", tmp_path / "a.json", "-o", tmp_path / "b.json"], capsys)
    for found in (cold, again):
        mean = found["mean"]
        assert isinstance(mean, dict) and mean["before"] < mean["after"] <= mean["bound"]
        assert mean["after"] > 0.98


def test_a_list_of_numbers_is_an_option_value(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "map.json"
    arguments = [trace, "--ep-size", 4, "--num-slots", 20, "-o", path, "--windows", 1]
    planned([*arguments, "--option", "rank_speed=1,1,1,0.25"], capsys)
    load = skewed().sum(axis=0)[None].astype(np.float64)
    expected = rebalance_experts(
        load, num_physical_experts=20, topology=Topology(4), rank_speed=(1.0, 1.0, 1.0, 0.25)
    )
    assert ExpertMap.load(path) == expected.expert_map
    said = refused([*arguments, "--option", "rank_speed=1,1"], capsys)
    assert "rank_speed has 2 values, expected 4" in said
    assert "rank_speed is 3, expected a value for each rank" in refused(
        [*arguments, "--option", "rank_speed=3"], capsys
    )


def cost_files(folder: Path, cost: np.ndarray) -> list[Path]:
    from safetensors.numpy import save_file

    paths = [folder / f"cost{suffix}" for suffix in (".json", ".npy", ".safetensors")]
    rows = [[None if np.isnan(value) else value for value in row] for row in cost.tolist()]
    paths[0].write_text(json.dumps(rows))
    np.save(paths[1], cost)
    save_file({"compute_cost": cost}, paths[2])
    return paths


def test_compute_cost_counts_whatever_the_file(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = np.random.default_rng(1).lognormal(size=(LAYERS, EXPERTS))
    cost[1, 3] = np.nan
    load = skewed().astype(np.float64)
    shape = {"num_physical_experts": 20, "topology": Topology(4), "algorithm": "compute_aware"}
    expected = rebalance_experts(load, compute_cost=cost, **shape).expert_map
    assert expected != rebalance_experts(load, **shape).expert_map
    arguments = [trace, "--ep-size", 4, "--num-slots", 20]  # with a cost, compute_aware is the default
    for path in cost_files(tmp_path, cost):
        output = tmp_path / f"{path.name}.map.json"
        planned([*arguments, "--compute-cost", path, "-o", output], capsys)
        assert ExpertMap.load(output) == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cost.json", b"[[1, 2], [3]]", "cost.json: [1]: 1 experts, expected 2"),
        ("cost.json", b'[[1, "2"]]', "cost.json: [0][1]: '2', expected a number or null"),
        ("cost.json", b"[[1, -2]]", "cost.json: [0][1]: -2, expected a time: 0, or from 1e-100 to 1e+100"),
        ("cost.json", b"[[1, 5e-324]]", "cost.json: [0][1]: 4.94066e-324, expected a time"),
        ("cost.json", b"[[1, 1" + b"0" * 400 + b"]]", "cost.json: a number has too many digits"),
        ("cost.npy", b"\x93NUMPY\x01\x00\x06\x00{'a': \n", "cost.npy: no .npy file"),
        ("cost.json", b"[[null, null]]", "cost.json: no expert was profiled, expected the time of at least"),
        ("cost.json", b"{}", "expected a list of times for each layer"),
        ("cost.json", b"[[1, 2]]", "compute_cost has shape (1, 2), expected [layers, logical], (3, 16)"),
        ("cost.npy", b"nothing", "cost.npy: no .npy file"),
        ("cost.safetensors", b"nothing", "cost.safetensors: no .safetensors file"),
        ("cost.txt", b"1", "suffix '.txt', expected one of .json, .npy, .safetensors"),
    ],
)
def test_compute_cost_that_cannot_be_used_is_one_line(
    name: str, content: bytes, said: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    arguments = [trace, "--ep-size", 4, "--num-slots", 20, "--algorithm", "compute_aware"]
    assert said in refused(
        [*arguments, "--compute-cost", tmp_path / name, "-o", tmp_path / "map.json"], capsys
    )


def test_compute_cost_needs_an_algorithm_that_counts_it(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path, *_) = cost_files(tmp_path, np.ones((LAYERS, EXPERTS)))
    arguments = [trace, "--ep-size", 4, "--num-slots", 20, "--compute-cost", path, "--algorithm", "adaptive"]
    assert "does not count compute cost, compute_aware does" in refused(
        [*arguments, "-o", tmp_path / "map.json"], capsys
    )
