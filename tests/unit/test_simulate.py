"""`eplb simulate`: the real balancer in simulated time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_platform.cli import run
from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.offline.hardware import HardwareProfile, load_profile
from eplb_platform.offline.serving import Setting
from eplb_platform.offline.simulate import Result, simulate
from eplb_platform.offline.step_time import rank_work
from eplb_platform.records import load_trace
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology

LAYERS, EXPERTS, STEPS, INTERVAL = 3, 16, 200, 40


def skewed(steps: int = STEPS, *, order: int | None = None) -> LoadTrace:
    """Few experts are hot, always the same: the first ones, or those of a seeded order."""
    popularity = np.arange(EXPERTS, 0, -1.0) ** 2
    if order is not None:
        popularity = np.random.default_rng(order).permutation(popularity)
    rng = np.random.default_rng(0)
    load = rng.multinomial(4096, popularity / popularity.sum(), size=(steps, LAYERS))
    return LoadTrace(load.astype(np.int32), (np.arange(steps) % 2).astype(np.uint8), {})


def hardware(agreement_ms: float) -> HardwareProfile:
    profile = load_profile("h100")
    return profile.model_copy(
        update={"links": profile.links.model_copy(update={"agreement_ms": agreement_ms})}
    )


def setting(**keys: Any) -> Setting:
    config = EplbConfig(
        **({"expert_heat_collection_interval": INTERVAL, "algorithm_execution_interval": 5} | keys)
    )
    return Setting(Topology(4, 2), 4, hardware(agreement_ms=0.01), config, planning_s=0.001)


def by_name(results: list[Result]) -> dict[str, Result]:
    return {result.name: result for result in results}


def test_the_balancer_balances_and_a_fixed_map_is_what_it_is() -> None:
    trace = skewed()
    results = by_name(simulate(trace, setting(), ["adaptive"]))
    assert list(results) == ["initial", "static", "adaptive"]
    initial = ExpertMap.initial(LAYERS, EXPERTS, Topology(4, 2), 4)
    expected = [rank_work(load, initial).balancedness for load in trace.expert_load[INTERVAL:]]
    assert results["initial"].balancedness == pytest.approx(expected)
    assert results["static"].balancedness.mean() > 0.9
    late = results["adaptive"].balancedness[-40:].mean()
    assert late > 0.9 > results["initial"].balancedness.mean()
    assert results["adaptive"].throughput > results["initial"].throughput
    assert results["adaptive"].commits >= LAYERS and results["adaptive"].failed_cycles == 0
    assert results["adaptive"].tokens == pytest.approx(4096 / 8 * (STEPS - INTERVAL))


def test_the_same_input_gives_the_same_result() -> None:
    first, again = (simulate(skewed(), setting(), ["deepseek"])[2] for _ in range(2))
    assert (first.step_s == again.step_s).all() and (first.balancedness == again.balancedness).all()
    assert first.experts_moved == again.experts_moved > 0


def test_no_map_has_seen_what_it_is_judged_on() -> None:
    """When the hot experts change after the first collection, what was planned on it is of no use."""
    before, after = skewed(INTERVAL), skewed(STEPS - INTERVAL, order=1)
    load = np.concatenate([before.expert_load, after.expert_load])
    trace = LoadTrace(load, np.ones(STEPS, dtype=np.uint8), {})
    results = by_name(simulate(trace, setting(), ["adaptive"]))
    assert results["static"].balancedness.mean() < 0.8
    assert results["adaptive"].balancedness[-40:].mean() > 0.9


def test_a_commit_comes_no_earlier_than_configured_and_takes_the_links_time() -> None:
    quick = by_name(simulate(skewed(), setting(), ["adaptive"]))["adaptive"]
    late = by_name(simulate(skewed(), setting(algorithm_execution_interval=60), ["adaptive"]))["adaptive"]

    def first_change(result: Result) -> int:
        fixed = by_name(simulate(skewed(), setting(), []))["initial"].balancedness
        return int(np.flatnonzero(result.balancedness != fixed)[0])

    assert first_change(late) >= 60 > first_change(quick) >= 5


def test_a_forward_thread_that_outruns_its_promise_waits() -> None:
    """A verdict takes longer than the margin of one step: every commit is waited for, and no longer."""
    slow = hardware(agreement_ms=50)
    given = setting(commit_margin_steps=1)
    result = simulate(skewed(), replace(given, profile=slow, planning_s=0.0), ["adaptive"])[2]
    assert 0.04 < result.longest_wait_s < 0.051
    assert result.step_s.max() > 0.04


def test_a_plan_that_takes_too_long_fails_the_cycle_and_the_map_stays() -> None:
    given = setting(transfer_timeout_s=0.01)
    result = simulate(skewed(), replace(given, planning_s=1.0), ["adaptive"])[2]
    assert result.failed_cycles >= 1 and result.commits == 0
    assert "no plan within 0.01 s" in result.last_error


def test_small_staging_moves_the_same_experts_in_more_commits() -> None:
    expert_mb = load_profile("h100").model.expert_bytes / 1e6
    small = simulate(skewed(), setting(staging_memory_mb=expert_mb * 1.01), ["deepseek"])[2]
    large = simulate(skewed(), setting(), ["deepseek"])[2]
    assert small.commits > large.commits
    assert small.longest_swap_s < large.longest_swap_s
    with pytest.raises(ValueError, match=r"staging_memory_mb=1 does not hold one expert \(44.0 MB\)"):
        simulate(skewed(), setting(staging_memory_mb=1.0), ["deepseek"])


def test_weighted_dispatch_is_simulated() -> None:
    """One expert has more load than a rank's share: only unequal shares can level the ranks then."""
    load = np.full((STEPS, 1, 6), 100, dtype=np.int32)
    load[:, :, 0] = 900
    trace = LoadTrace(load, np.zeros(STEPS, dtype=np.uint8), {})
    even, weighted = (
        simulate(
            trace,
            replace(setting(weighted_dispatch=on), topology=Topology(4), num_redundant_experts=6),
            ["deepseek"],
        )[2]
        for on in (False, True)
    )
    assert weighted.balancedness[-1] >= even.balancedness[-1]
    assert weighted.balancedness[-1] == pytest.approx(1.0, abs=0.05)


def test_a_trace_without_steps_to_judge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"40 steps, expected more than the 40 of the first collection"):
        simulate(skewed(INTERVAL), setting(), ["adaptive"])
    empty = LoadTrace(np.zeros((STEPS, 1, 4), dtype=np.int32), np.zeros(STEPS, dtype=np.uint8), {})
    with pytest.raises(ValueError, match="no token in the steps after the first collection"):
        simulate(empty, setting(), [])


# --- the command ---


def command(path: Path, *arguments: str) -> list[str]:
    return ["simulate", str(path), "--ep-size", "4", "--planning-time", "0.01", *arguments]


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    path = tmp_path / "trace.safetensors"
    load_trace.write(path, skewed())
    return path


def test_json_has_what_the_table_has(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = trace_path.with_name("p.png")
    arguments = ["--algorithm", "adaptive,deepseek", "--redundant-experts", "4", "--plot", str(picture)]
    assert run(command(trace_path, *arguments, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["results"]] == ["initial", "static", "adaptive", "deepseek"]
    assert found["eplb_config"]["expert_heat_collection_interval"] == INTERVAL == STEPS // 5
    assert found["results"][0]["speedup"] == 1.0 < found["results"][1]["speedup"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run(command(trace_path, *arguments[:-2])) == 0
    shown = capsys.readouterr().out
    for row in found["results"]:
        line = next(line for line in shown.splitlines() if line.strip().startswith(row["name"]))
        assert f"{row['balancedness']:.4f}" in line


def test_a_map_is_served_beside(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = trace_path.with_name("map.json")
    assert run(["plan", str(trace_path), "-o", str(planned), "--ep-size", "4", "--num-slots", "16"]) == 0
    capsys.readouterr()
    assert run(command(trace_path, "--map", str(planned), "--algorithm", "random", "--json")) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["results"]]
    assert names == ["initial", "static", str(planned), "random"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--redundant-experts", "3"], "19 slots, expected a multiple of 4 ranks (nearest: 4)"),
        (["--set", "intervall=3"], "eplb_config.intervall: unknown key"),
        (["--set", "interval"], "--set interval: expected KEY=VALUE of eplb_config"),
        (["--algorithm", "best"], "no algorithm 'best'"),
        (["--hardware", "h1000"], "no hardware profile 'h1000'"),
        (["--model", "hidden=3"], "--model hidden=3: expected KEY=NUMBER of hidden_size"),
        (["--model", "hidden_size=1e400"], "model.hidden_size: inf, expected"),
        (["--iter-range", "500-600"], "no step in iterations 500-600"),
        (["--set", "expert_heat_collection_interval=600"], "200 steps, expected more than the 600"),
        (["--map", "none.json"], "none.json: No such file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], expected: str, trace_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(trace_path, *arguments)) == 2
    output = capsys.readouterr()
    assert not output.out and len(output.err.splitlines()) == 1
    assert expected in output.err
