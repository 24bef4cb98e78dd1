"""`eplb bench`: what it measures is what the library says, peers beside ours, and input that is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_platform.algorithms import Algorithm, rebalance_experts
from eplb_platform.balance import balancedness, lower_bound, moved_experts, rank_load
from eplb_platform.cli import run
from eplb_platform.offline import bench as measuring
from eplb_platform.offline.bench import Shape
from eplb_platform.offline.synthetic_load import SYNTHETIC_LOADS, LoadShape, drifting, switching, zipf
from eplb_platform.records import load_trace
from eplb_platform.records.load_trace import LoadTrace

SMALL = ["--shape", "16x20x4", "--layers", "2", "--collections", "3", "--forwards", "5"]


def measured(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], Any]:
    assert run(["bench", *arguments, "--json"]) == 0
    output = capsys.readouterr()
    assert not output.err
    return {(row["load"], row["contender"]): row for row in json.loads(output.out)}


def written(path: Path, steps: np.ndarray) -> str:
    load_trace.write(path, LoadTrace(steps, np.full(len(steps), 2, dtype=np.uint8), {}))
    return str(path)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["bench", *arguments]) == 2
    output = capsys.readouterr()
    assert not output.out and len(output.err.splitlines()) == 1
    return output.err


@pytest.mark.parametrize("name", SYNTHETIC_LOADS)
def test_loads_are_seeded_and_of_the_shape_asked_for(name: str) -> None:
    shape = LoadShape(2, 32, num_groups=4, num_collections=3, num_forwards=5, tokens_per_forward=10)
    first, again, other = (np.stack(SYNTHETIC_LOADS[name](shape, seed)) for seed in (0, 0, 1))
    assert first.shape[0] == 3 and first.shape[2:] == (2, 32)
    assert (first >= 0).all() and np.isfinite(first).all()
    assert (first == again).all() and (first != other).any()
    assert (first[0].sum(axis=0) != first[1].sum(axis=0)).any()


def test_sampled_loads_have_all_tokens_and_drift_as_they_are_told() -> None:
    shape = LoadShape(1, 16, num_collections=2, num_forwards=200, tokens_per_forward=1000)
    for load in (drifting, switching):
        assert (np.concatenate(load(shape, 3)).sum(axis=2) == 8000).all()

    def change(correlation: float) -> float:
        steps = np.concatenate(drifting(shape, 3, correlation=correlation))[:, 0]
        return float(np.abs(np.diff(steps, axis=0)).mean())

    assert change(0.99) < change(0.5)


def test_it_measures_what_the_library_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = np.random.default_rng(0).integers(0, 100, (6, 2, 16))
    found = measured(
        [
            *(
                written(tmp_path / f"{name}.safetensors", part)
                for name, part in (("a", steps[:3]), ("b", steps[3:]))
            ),
            *("--shape", "16x20x4x2", "--algorithm", "deepseek", "--forwards", "3"),
        ],
        capsys,
    )["a + b", "deepseek"]
    topology = Shape.parse("16x20x4x2").topology
    first = rebalance_experts(steps[:3], num_physical_experts=20, topology=topology, algorithm="deepseek")
    then = rebalance_experts(steps[3:], topology=topology, current=first.expert_map, algorithm="deepseek")
    result = found["result"]
    assert result["cold"] == pytest.approx(first.balancedness.mean())
    assert result["in_window"] == pytest.approx(then.balancedness.mean())
    bound = lower_bound(steps[3:], 20, topology)
    assert result["above_bound"] == pytest.approx((1 / (then.balancedness * bound)).mean() - 1)
    assert result["moved"] == moved_experts(first.expert_map, then.expert_map).sum()
    assert result["moved_share"] == pytest.approx(result["moved"] / 40)
    unseen = balancedness(rank_load(first.expert_map, steps[3:])).mean()
    assert result["next_forward"] == pytest.approx(unseen)
    assert result["plan_ms"] > 0 and result["cold_ms"] > 0


def test_all_algorithms_on_all_seeded_loads(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(SMALL, capsys)
    assert {load for load, _ in found} == set(SYNTHETIC_LOADS)
    assert {"adaptive", "deepseek", "flashlb", "swift_balancer", "vllm"} <= {name for _, name in found}
    for row in found.values():
        if not row["peer"]:
            assert 0 < row["result"]["in_window"] <= 1 and row["result"]["above_bound"] >= -1e-9
            assert row["layers"] == 2 and row["shape"] == "16x20x4"
    assert found["zipf", "adaptive"]["result"]["cold"] > found["zipf", "adaptive"]["initial"]


def test_the_table_has_a_row_for_each_algorithm_and_says_which_peer_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "eplb_platform.integrations.vllm.peer_policy", raising=False)
    assert run(["bench", *SMALL, "--load", "zipf", "--algorithm", "adaptive,random"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("zipf, 16x20x4, 2 layers, 3 collections")
    rows = [line.split() for line in lines if line.strip().startswith(("adaptive", "random"))]
    assert [row[0] for row in rows] == ["adaptive", "random"] and all(len(row) == 9 for row in rows)
    assert sum(line.startswith("vllm: not installed") for line in lines) == 1


class Refusing(Algorithm):
    name = "refusing"

    def place(self, load: np.ndarray, **_: object) -> np.ndarray:
        raise AssertionError("no such shape")


class Copied(Algorithm):
    name = "copied"

    def place(self, load: np.ndarray, **_: object) -> np.ndarray:
        return np.tile(np.arange(20, dtype=np.int32) % 16, (load.shape[1], 1))


def test_peers_stand_beside_ours_and_one_that_fails_spoils_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = {"refusing": Refusing, "copied": Copied}
    monkeypatch.setattr(measuring, "discover_peers", lambda: (peers, {"broken": OSError("no library")}))
    found = measured([*SMALL, "--load", "zipf", "--algorithm", "adaptive"], capsys)
    assert found["zipf", "refusing"]["result"] is None
    assert "no such shape" in found["zipf", "refusing"]["reason"]
    assert "no library" in found["zipf", "broken"]["reason"]
    assert found["zipf", "copied"]["peer"] and found["zipf", "copied"]["result"]["moved"] == 0
    assert found["zipf", "adaptive"]["result"]["cold"] > found["zipf", "copied"]["result"]["cold"]


def test_one_collection_has_a_first_plan_only(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "16x16x4", "--load", "zipf", "--algorithm", "deepseek", "--collections", "1"]
    result = measured(arguments, capsys)["zipf", "deepseek"]["result"]
    assert result["cold"] > 0
    assert result["in_window"] is result["next_forward"] is result["moved"] is result["plan_ms"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "64x64"], "'64x64' is no shape, expected EXPERTSxSLOTSxRANKS"),
        (["--shape", "64x0x8"], "is no shape"),
        (["--shape", "64x66x8"], "64x66x8: expected a multiple of ranks as slots"),
        (["--shape", "64x56x8"], "64x56x8: expected at least as many slots as experts"),
        (["--shape", "64x64x8x16"], "at most as many nodes as ranks"),
        (["--shape", "64x64x8x2x5"], "a divisor of the experts as groups"),
        (["--load", "zipf,gauss"], "no load 'gauss' (known: zipf, "),
        (["--algorithm", "deepsek"], "no algorithm 'deepsek', did you mean 'deepseek'"),
        (["nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(arguments, capsys)


def test_traces_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = written(tmp_path / "one.safetensors", np.ones((2, 2, 24), dtype=np.int64))
    other = written(tmp_path / "other.safetensors", np.ones((2, 2, 16), dtype=np.int64))
    assert "has 24 experts, which none of the shapes" in refused([one], capsys)
    assert "one model's traces are expected" in refused([one, other], capsys)


def test_zipf_is_the_hottest_expert_over_its_rank() -> None:
    (load,) = zipf(LoadShape(1, 8, num_collections=1), 0)
    np.testing.assert_allclose(np.sort(load[0, 0])[::-1], 1e6 / np.arange(1, 9))
