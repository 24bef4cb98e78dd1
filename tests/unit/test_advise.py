"""`eplb advise`: what is advised on loads of which the answer is known."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eplb_platform.cli import run
from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.offline.advise import Advice, Question, advise, expert_memory_gb
from eplb_platform.offline.hardware import HardwareProfile, load_profile
from eplb_platform.records import load_trace
from eplb_platform.records.load_trace import LoadTrace

LAYERS, EXPERTS, STEPS = 2, 16, 400


def hardware() -> HardwareProfile:
    """H100 with agreements of no time, since the steps of two layers are short."""
    profile = load_profile("h100")
    return replace_links(profile, agreement_ms=0.001)


def replace_links(profile: HardwareProfile, **changes: float) -> HardwareProfile:
    return profile.model_copy(update={"links": profile.links.model_copy(update=changes)})


def loads(popularity: np.ndarray, steps: int = STEPS) -> LoadTrace:
    """Prefill steps; popularity: [steps or 1, experts]"""
    rng = np.random.default_rng(0)
    shares = np.broadcast_to(popularity / popularity.sum(axis=1, keepdims=True), (steps, EXPERTS))
    load = rng.multinomial(1 << 16, shares[:, None].repeat(LAYERS, axis=1))
    return LoadTrace(load.astype(np.int32), np.zeros(steps, dtype=np.uint8), {})


LEVEL = loads(np.ones((1, EXPERTS)))
# One expert has a third of the load: without a replica no placement is level.
HOT = loads(np.where(np.arange(EXPERTS) == 5, EXPERTS / 2, 1.0)[None])


def asked(trace: LoadTrace, memory_slots: int, **changes: object) -> Advice:
    profile = hardware()
    memory = expert_memory_gb(profile, LAYERS, memory_slots)
    return advise(trace, replace(Question(profile, memory, ep_sizes=(4,)), **changes))  # type: ignore[arg-type]


def test_level_load_needs_nothing() -> None:
    advice = asked(LEVEL, 8)
    assert advice.chosen.redundant_experts == 0 and advice.interval is None
    assert advice.eplb_config() == {"expert_map_path": "map.json"}
    assert "0 redundant experts" in advice.reasons()[1] and advice.reasons()[-1].startswith("Static")


def test_a_hot_expert_is_worth_the_memory_of_its_replicas() -> None:
    advice = asked(HOT, 8)
    assert advice.chosen.redundant_experts >= 4
    assert advice.chosen.balancedness > 0.95 > 0.8 > advice.without.balancedness
    assert advice.chosen.memory_gb <= advice.question.memory_gb
    reason = advice.reasons()[1]
    assert f"{advice.chosen.balancedness:.3f} against {advice.without.balancedness:.3f}" in reason
    tight = asked(HOT, 4)
    assert tight.chosen.redundant_experts == 0


def test_load_that_changes_is_balanced_while_serving() -> None:
    """What was hot in the half that is planned on is not what is hot in the other, and that stays so."""
    order = np.random.default_rng(3)
    first, then = (order.permutation(np.arange(EXPERTS, 0, -1.0) ** 2) for _ in range(2))
    steps = 1200
    popularity = np.where(np.arange(steps)[:, None] < steps // 2, first, then)
    advice = asked(loads(popularity, steps), 4)
    assert advice.interval in advice.dynamic and set(advice.dynamic) == {100}
    assert advice.gain_of_balancing > 0.05
    assert EplbConfig(**advice.eplb_config()).dynamic_eplb  # type: ignore[arg-type]
    assert "Dynamic, from collections of 100 steps" in advice.reasons()[-1]


def test_the_front_holds_what_nothing_beats() -> None:
    advice = asked(HOT, 7, ep_sizes=(2, 4, 8))
    assert {choice.topology.num_ranks for choice in advice.choices} == {4, 8}  # 2 ranks need 8 slots and more
    for choice in advice.choices:
        beaten = [
            other
            for other in advice.choices
            if other.memory_gb <= choice.memory_gb
            and other.balancedness >= choice.balancedness
            and other.step_s <= choice.step_s
            and (other.memory_gb, other.balancedness, other.step_s)
            != (choice.memory_gb, choice.balancedness, choice.step_s)
        ]
        assert choice.on_front == (not beaten)


def test_the_objective_chooses_the_ranks() -> None:
    throughput = asked(HOT, 8, ep_sizes=(4, 8)).chosen
    latency = asked(HOT, 8, ep_sizes=(4, 8), for_latency=True).chosen
    assert throughput.topology.num_ranks == 4 and latency.topology.num_ranks == 8


def test_groups_are_kept_on_nodes_where_that_costs_nothing() -> None:
    profile = replace_links(hardware(), ranks_per_node=2)
    memory = expert_memory_gb(profile, LAYERS, 4)
    advice = advise(LEVEL, Question(profile, memory, ep_sizes=(4,), num_expert_groups=4))
    assert advice.chosen.is_hierarchical and advice.other_placement is not None
    assert "Hierarchical placement" in " ".join(advice.reasons())


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.1 GB do not hold the experts: EP size 4 needs 0\.5 GB"):
        advise(LEVEL, Question(hardware(), 0.1, ep_sizes=(4,)))
    with pytest.raises(ValueError, match="3 steps, expected at least 4"):
        advise(LEVEL, Question(hardware(), 10), steps=range(3))


# --- the command ---


def test_what_is_printed_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    load_trace.write("trace.safetensors", HOT)
    arguments = ["advise", "trace.safetensors", "--memory", "2", "--ep-size", "4"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (chosen,) = [choice for choice in found["choices"] if choice["chosen"]]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert found["mode"] == "static" and all(reason in shown for reason in found["reasons"])
    for command in found["commands"].values():
        assert command in shown
    assert run(shlex.split(found["commands"]["plan"])[1:]) == 0
    placed = ExpertMap.load(tmp_path / "map.json")
    assert placed.topology.num_ranks == 4 and placed.num_redundant_experts == chosen["redundant_experts"]
    given = shlex.split(found["commands"]["vllm"])
    assert json.loads(given[given.index("--additional-config") + 1]) == {"eplb_config": found["eplb_config"]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ep-size", "4,x"], "--ep-size x: expected numbers of ranks"),
        (["--memory", "0.001"], "0.001 GB do not hold the experts"),
        (["--objective", "both"], "--objective"),
        (["--num-expert-groups", "3"], "num_expert_groups is 3, expected a divisor of the 16"),
        (["--algorithm", "best"], "no algorithm 'best'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.safetensors"
    load_trace.write(path, LEVEL)
    assert run(["advise", str(path), "--ep-size", "16", *arguments]) == 2
    output = capsys.readouterr()
    assert not output.out and len(output.err.splitlines()) == 1
    assert expected in output.err
