"""The demo without its processes: what it refuses, what it serves when, how it measures and judges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from eplb_platform.cli import run
from eplb_platform.demo.measures import load_by_rank, total_load
from eplb_platform.demo.messages import Progress, RankResult
from eplb_platform.demo.picture import draw
from eplb_platform.demo.processes import RankFailed
from eplb_platform.demo.report import as_json, table, unequal_legend, unequal_table
from eplb_platform.demo.run import (
    PHASES,
    DemoResult,
    beginning,
    costly_experts,
    eplb_config,
    run_demo,
    summarise,
)
from eplb_platform.demo.schedule import Text, plan_serving
from eplb_platform.demo.settings import CheckedSettings, DemoSettings, Serving, check
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime.stats import BalancerStats
from eplb_platform.topology import Topology

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "num_experts": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint `model` of 4 layers of 64 experts and a text `a.txt`."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    (tmp_path / "a.txt").write_text("Some text that is long enough. " * 10)
    return tmp_path


def write_checkpoint(folder: Path, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file({"x": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")


def settings(**changes: object) -> DemoSettings:
    sound = DemoSettings(model=Path("model"), texts=(Path("a.txt"),))
    return replace(sound, **changes)  # type: ignore[arg-type]


# --- what it refuses ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--ranks 1", "--ranks 1"),
        ("--ranks 0", "--ranks 0"),
        ("--ranks 1000", "--ranks 1000"),
        ("--redundant-experts 7", "nearest number that does is 8"),
        ("--redundant-experts -4", "nearest number that does is 0"),
        ("--redundant-experts 100000", "--redundant-experts 100000"),
        ("--ranks 3 --redundant-experts 4", "nearest number that does is 5"),
        ("--seed -1", "--seed -1"),
        ("--heat-interval 0", "--heat-interval 0"),
        ("--plan-interval -1", "--plan-interval -1"),
        ("--steps 10", "--steps 10"),
        ("--text absent.txt", "absent.txt"),
        ("--text .", "cannot be read"),
        ("--text empty.txt", "has 0 bytes"),
        ("--model absent", "absent"),
        ("--model a.txt", "a.txt"),
        ("--picture load.pdf", ".png"),
        ("--picture .", "folder"),
        ("--picture a.txt/load.png", "not a folder"),
        ("--expert-map-record-path map.txt", ".json"),
        ("--expert-map-path absent.json", "absent.json"),
        ("--expert-map-path other_ranks.json", "expected 4 ranks"),
        ("--expert-map-path other_experts.json", "other_experts.json"),
        ("--expert-map-path other_layers.json", "has 3 layers"),
        ("--backend cpuu", "cpuu"),
    ],
)
def test_wrong_option_is_named_on_one_line_before_anything_is_written(
    options: str, named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.txt").touch()
    ExpertMap.initial(4, 64, Topology(2)).save(folder / "other_ranks.json")
    ExpertMap.initial(4, 60, Topology(4)).save(folder / "other_experts.json")
    ExpertMap.initial(3, 64, Topology(4)).save(folder / "other_layers.json")
    before = sorted(folder.rglob("*"))
    defaults = [] if "--model" in options else ["--model", "model"]
    defaults += [] if "--text" in options else ["--text", "a.txt"]
    assert run(["demo", *defaults, *options.split()]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert len(output.err.splitlines()) == 1
    assert named in output.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen3"}, "qwen3_moe"),
        ({"vocab_size": 1000}, "vocab_size"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "no mixture-of-experts layer"),
        ({"max_position_embeddings": 8}, "takes 8 tokens"),
    ],
)
def test_other_checkpoints_are_refused(changes: dict[str, object], named: str, folder: Path) -> None:
    write_checkpoint(folder / "model", **changes)
    with pytest.raises(ValueError, match=named):
        check(settings())


def test_number_of_experts_under_either_name(folder: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "num_experts"} | {"num_local_experts": 48}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    assert check(settings()).shape.num_logical_experts == 48


@given(ranks=st.integers(2, 64), experts=st.integers(1, 300))
def test_default_redundancy_always_fills_every_rank_evenly(ranks: int, experts: int) -> None:
    from eplb_platform.demo.settings import _redundant_experts

    redundant = _redundant_experts(settings(ranks=ranks), experts)
    assert (experts + redundant) % ranks == 0
    assert experts // 4 <= redundant < experts // 4 + ranks


def test_map_with_other_redundancy_is_accepted(folder: Path) -> None:
    ExpertMap.initial(4, 64, Topology(4), 16).save(folder / "given.json")
    checked = check(settings(expert_map_path=folder / "given.json"))
    assert eplb_config("static", checked) == {
        "eplb_config": {"backend": "auto", "expert_map_path": str(folder / "given.json")}
    }


def test_configuration_of_every_phase_is_one_that_engines_are_given(folder: Path) -> None:
    from eplb_platform.config import EplbConfig, Mode

    checked = check(settings())
    modes = {}
    for phase in PHASES[1:]:
        modes[phase] = EplbConfig.from_additional_config(eplb_config(phase, checked), environ={}).mode
    assert modes == {"dynamic": Mode.DYNAMIC, "record": Mode.RECORD, "static": Mode.STATIC}
    assert eplb_config("contiguous", checked) is None


# --- what it serves when ---


def texts(count: int) -> list[Text]:
    return [Text(f"t{kind}", np.full(200, kind, dtype=np.uint8)) for kind in range(count)]


@given(count=st.integers(1, 7), steps=st.integers(10, 200), ranks=st.integers(2, 5), seed=st.integers(0, 9))
def test_every_forward_pass_is_served_once_and_by_all_ranks(
    count: int, steps: int, ranks: int, seed: int
) -> None:
    serving = Serving(sequences=6, prompt_tokens=5, forwards_per_batch=7)
    schedule = plan_serving(texts(count), ranks=ranks, steps=steps, serving=serving, seed=seed)
    assert [batch.start for batch in schedule.batches] == list(
        np.cumsum([0, *(batch.forwards for batch in schedule.batches)])[:-1]
    )
    assert sum(batch.forwards for batch in schedule.batches) == steps
    assert all(batch.prompts.shape == (ranks, -(-6 // ranks), 5) for batch in schedule.batches)


def test_the_mix_changes_during_the_phase() -> None:
    schedule = plan_serving(texts(4), ranks=2, steps=90, serving=Serving(32, 4, 10), seed=1)
    mixes = []
    for stretch in schedule.stretches:
        batches = [batch for batch in schedule.batches if stretch.start <= batch.start < stretch.end]
        kinds = np.concatenate([batch.prompts[..., 0].ravel() for batch in batches])
        mixes.append((np.bincount(kinds, minlength=4) / len(kinds)).tolist())
    assert mixes == [[0.375, 0.375, 0.125, 0.125], [0.125, 0.125, 0.375, 0.375], [0.25] * 4]
    labels = [stretch.label for stretch in schedule.stretches]
    assert labels == ["mostly t0 + t1", "mostly t2 + t3", "all texts alike"]


def test_the_seed_and_nothing_else_draws_the_prompts() -> None:
    text = [Text("t", np.arange(250, dtype=np.uint8))]
    first, again, other = (
        plan_serving(text, ranks=2, steps=40, serving=Serving(4, 8, 10), seed=seed) for seed in (3, 3, 4)
    )
    prompts = [np.stack([batch.prompts for batch in plan.batches]) for plan in (first, again, other)]
    assert np.array_equal(prompts[0], prompts[1])
    assert not np.array_equal(prompts[0], prompts[2])


# --- how it measures and judges ---


def test_rank_load_is_read_from_the_slots_that_tokens_went_to() -> None:
    sent = np.array([[[1, 2, 3, 4], [0, 0, 5, 5]]], dtype=np.int32)
    by_rank = load_by_rank(sent, num_ranks=2)
    assert by_rank.tolist() == [[[3, 7], [0, 10]]]
    load = total_load([by_rank, np.array([[[7, 3], [10, 0]]])])
    assert load.mean_from(0) == 1.0
    assert total_load([by_rank]).balancedness.tolist() == [[5 / 7, 0.5]]
    assert total_load([by_rank]).worst_layer_from(0) == 0.5


def phase(
    name: str, loads: Sequence[Sequence[int]], *, token: int = 1, first_commit: int | None = None
) -> list[RankResult]:
    """Results of two ranks, of which the first sent everything. loads: [forwards][ranks], of each layer."""
    load: NDArray[np.int64] = np.repeat(np.array(loads)[:, None, :], 4, axis=1)
    stats = BalancerStats(cycles=2, moved_experts=5, longest_stall_s=0.004, first_commit_step=first_commit)
    held = None if name == "contiguous" else stats
    return [
        RankResult([np.full((2, 3), token, np.uint8)], sent, np.arange(1.0, len(load) + 1), held)
        for sent in (load, np.zeros_like(load))
    ]


def result(folder: Path, **replaced: list[RankResult]) -> DemoResult:
    checked = check(settings(ranks=2, steps=112, redundant_experts=0, picture=folder / "new" / "load.png"))
    ranks = {
        name: phase(name, [[3, 1]] * 4 if name in ("contiguous", "record") else [[2, 2]] * 4)
        for name in PHASES
    }
    phases = {name: summarise(name, results) for name, results in (ranks | replaced).items()}
    schedule = plan_serving(texts(3), ranks=2, steps=4, serving=Serving(2, 2, 2), seed=0)
    return DemoResult(checked, schedule, phases)


def test_a_sound_result_has_no_fault(folder: Path) -> None:
    assert result(folder).faults == []


def test_one_changed_token_is_a_fault(folder: Path) -> None:
    changed = phase("static", [[2, 2]] * 4)
    changed[1].tokens[0][1, 2] += 1
    found = result(folder, static=changed)
    assert found.different_tokens == ["static"]
    assert any("phase static generated other tokens" in fault for fault in found.faults)
    assert as_json(found)["tokens_identical"] is False


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_balancedness_that_did_not_rise_is_a_fault(name: str, folder: Path) -> None:
    found = result(folder, **{name: phase(name, [[3, 1]] * 4)})
    assert found.faults == [f"phase {name} did not raise balancedness: 0.667, without 0.667"]


def test_balancedness_counts_from_the_first_commit_on(folder: Path) -> None:
    loads = [[3, 1], [3, 1], [2, 2], [2, 2]]
    found = result(folder, dynamic=phase("dynamic", loads, first_commit=2))
    numbers = as_json(found)["phases"]["dynamic"]  # type: ignore[index]
    assert numbers["balancedness"] == 1.0
    assert numbers["balancedness_all_forwards"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-4)
    assert (numbers["moved_experts"], numbers["cycles"], numbers["stall_ms_max"]) == (5, 2, 4.0)
    assert (numbers["forward_ms_median"], numbers["forward_ms_max"]) == (2.5, 4.0)


def with_unequal(found: DemoResult, by_tokens: float, by_time: float, passes: int = 200) -> DemoResult:
    """Two ranks' experts took these parts of the hottest rank's time on the other rank."""
    unequal = {}
    for name, other in (("by tokens", by_tokens), ("by time", by_time)):
        ranks = phase(name, [[2, 2]] * passes, first_commit=1)
        times = (1.0, 2 * other - 1)  # mean / max is `other`
        timed = [
            replace(of_rank, expert_ms=np.full((2, 4), spent))
            for of_rank, spent in zip(ranks, times, strict=True)
        ]
        unequal[name] = summarise(name, timed)
    return replace(found, unequal=unequal)


def test_time_that_is_not_better_balanced_by_time_is_a_fault(folder: Path) -> None:
    found = with_unequal(result(folder), by_tokens=0.7, by_time=0.95)
    assert found.faults == []
    numbers = as_json(found)["unequal_experts"]["by time"]  # type: ignore[index]
    assert numbers["time_balancedness"] == pytest.approx(0.95, abs=1e-4)
    shown = [list(column.cells) for column in unequal_table(found).columns]
    assert shown[0] == ["not yet", "by tokens", "by time"] and shown[2] == ["0.700", "0.700", "0.950"]
    assert "one expert in 8" in unequal_legend(found)
    worse = with_unequal(result(folder), by_tokens=0.8, by_time=0.75)
    assert worse.faults == ["balancing by time did not raise its balancedness: 0.750, by tokens 0.800"]
    assert with_unequal(result(folder), by_tokens=0.8, by_time=0.75, passes=199).faults == []
    worse.unequal["by time"].tokens[1][0] += 1
    assert worse.different_tokens == ["by time"]


def test_costly_experts_are_drawn_by_the_seed(folder: Path) -> None:
    repeats = costly_experts(check(settings()))
    assert repeats.shape == (4, 64) and (np.sort(repeats, axis=1)[:, 56:] == 8).all()
    assert (repeats == 1).sum() == 4 * 56
    np.testing.assert_array_equal(repeats, costly_experts(check(settings())))
    part = beginning(plan_serving(texts(3), ranks=2, steps=480, serving=Serving(), seed=0), check(settings()))
    assert part.steps == sum(batch.forwards for batch in part.batches) and 240 <= part.steps < 480


def test_json_and_table_name_every_phase_and_the_picture_is_drawn(folder: Path) -> None:
    from rich.console import Console

    found = result(folder)
    assert set(json.loads(json.dumps(as_json(found)))["phases"]) == set(PHASES)
    console = Console(width=80, record=True, file=(folder / "table.txt").open("w"))
    console.print(table(found))
    lines = [line.strip() for line in console.export_text().splitlines()]
    assert all(any(line.startswith(name) for line in lines) for name in PHASES)
    assert not any("…" in line for line in lines)
    draw(found)
    assert (folder / "new" / "load.png").read_bytes().startswith(b"\x89PNG")


def test_checked_settings_count_slots(folder: Path) -> None:
    checked: CheckedSettings = check(settings(redundant_experts=16))
    assert checked.num_physical_experts == 80


def test_a_map_of_an_earlier_run_is_not_served_as_the_recorded_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record phase that wrote nothing ends the demo, whatever lies at the path."""
    sound = result(folder)
    unwritten = {
        name: replace(phase, maps_written=0, last_error="the disk is full")
        for name, phase in sound.phases.items()
    }
    monkeypatch.setattr("eplb_platform.demo.run._serve", lambda name, *_: unwritten[name])
    with pytest.raises(RankFailed, match="phase record: rank 0: no map was written: the disk is full"):
        run_demo(sound.settings, Silence())


class Silence:
    """An observer that says nothing."""

    def begin(self, phase: str, steps: int) -> None: ...

    def update(self, phase: str, rank: int, progress: Progress) -> None: ...

    def end(self, phase: str) -> None: ...
