"""`eplb report`: TensorRT-LLM's statistics, projections, drift, phases, the page and the picture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eplb_platform.algorithms import rebalance_experts
from eplb_platform.balance import rank_load
from eplb_platform.cli import run
from eplb_platform.expert_map import ExpertMap
from eplb_platform.offline.report import make_report, rank_share
from eplb_platform.offline.report_page import page
from eplb_platform.records import load_trace, tensorrt_llm_yaml
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology
from tests.unit.engine_files import tensorrt_llm_statistics as statistics

STEPS, LAYERS, EXPERTS, RANKS = 40, 3, 8, 4
LOAD = np.random.default_rng(3).integers(1, 90, (STEPS, LAYERS, EXPERTS))
MAP = ExpertMap(
    np.stack([np.random.default_rng(i).permutation(np.arange(12) % 8) for i in range(3)]), 8, Topology(4)
)


def reported(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(["report", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["report", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert not output.out and len(output.err.splitlines()) == 1
    return output.err


def trace_file(path: Path, load: np.ndarray = LOAD, phase: np.ndarray | None = None) -> Path:
    phases = np.full(len(load), 1, dtype=np.uint8) if phase is None else phase.astype(np.uint8)
    load_trace.write(path, LoadTrace(load, phases))
    return path


def expected_statistics(rank_tokens: np.ndarray) -> dict[str, list[float]]:
    """TensorRT-LLM's definitions in torch; rank_tokens: [steps, layers, ranks]."""
    load = torch.from_numpy(rank_tokens).double()
    ratio = load.max(dim=-1).values / load.mean(dim=-1) - 1
    return {
        "mean": load.mean(dim=-1).mean(dim=0).tolist(),
        "std": load.std(dim=-1).mean(dim=0).tolist(),
        "imbalance_ratio": ratio.mean(dim=0).tolist(),
    }


def test_statistics_are_those_of_tensorrt_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = statistics(tmp_path / "statistics", LOAD, ep_size=RANKS)
    tensorrt_llm_yaml.write(tmp_path / "map.yaml", MAP, first_moe_layer=3)
    found = reported(capsys, folder, "--map", tmp_path / "map.yaml", "--ep-size", 4)
    before = LOAD.reshape(STEPS, LAYERS, RANKS, -1).sum(axis=3)
    for layout, rank_tokens in zip(found["layouts"], (before, rank_load(MAP, LOAD)), strict=True):
        for name, values in expected_statistics(rank_tokens).items():
            assert [layer[name] for layer in layout["layers"]] == pytest.approx(values)
            assert layout["average"][name] == pytest.approx(np.mean(values))
        assert [layer["layer"] for layer in layout["layers"]] == [3, 4, 5]
    assert [layout["name"] for layout in found["layouts"]] == ["initial layout", str(tmp_path / "map.yaml")]


def test_the_table_has_the_engine_s_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = statistics(tmp_path / "statistics", np.full((2, 1, 4), 512), ep_size=2)
    assert run(["report", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("Load statistics:")
    assert lines[at + 1].split()[:3] == ["mean", "std", "imbalance-ratio"]
    assert lines[at + 2].split() == ["3", "1024.0", "0.0", "0.0", "1.0"]
    assert lines[at + 3].split()[:2] == ["average", "1024.0"]


def test_iterations_are_those_of_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = statistics(tmp_path / "statistics", LOAD, ep_size=RANKS, first_iteration=100)
    found = reported(capsys, folder, "--iter-range", "110-120")
    expected = expected_statistics(LOAD[10:20].reshape(10, LAYERS, RANKS, -1).sum(axis=3))
    assert found["steps"] == 10 and found["first_iteration"] == 110
    layers = found["layouts"][0]["layers"]
    assert [layer["imbalance_ratio"] for layer in layers] == pytest.approx(expected["imbalance_ratio"])
    assert "the load has 100-140" in refused(capsys, folder, "--iter-range", "140-150")
    for wrong in ("5", "9-3", "a-b", "3-3"):
        assert "expected A-B" in refused(capsys, folder, "--iter-range", wrong)


def test_a_plan_is_judged_on_iterations_that_it_has_not_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = statistics(tmp_path / "statistics", LOAD, ep_size=RANKS)
    options = ["--ep-size", "4", "--num-slots", "12", "--algorithm", "deepseek", "--iter-range", "100-120"]
    assert run(["plan", str(folder), *options, "-o", str(tmp_path / "map.yaml")]) == 0
    expected = rebalance_experts(
        LOAD[:20].astype(float), num_physical_experts=12, topology=Topology(4), algorithm="deepseek"
    )
    planned = ExpertMap.load(tmp_path / "map.yaml", topology=Topology(4))
    assert planned == expected.expert_map
    capsys.readouterr()
    arguments = [folder, "--map", tmp_path / "map.yaml", "--ep-size", 4, "--iter-range", "120-140"]
    average = reported(capsys, *arguments)["layouts"][1]["average"]
    ratios = expected_statistics(rank_load(planned, LOAD[20:]))["imbalance_ratio"]
    assert average["imbalance_ratio"] == pytest.approx(np.mean(ratios))
    assert run(["plan", str(folder), *options[:-1], "1-5", "-o", str(tmp_path / "map.yaml")]) == 2
    assert "no steps of phase 'all' in iterations 1-5" in capsys.readouterr().err


def test_phases_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phase = np.arange(STEPS) % 2
    found = reported(capsys, trace_file(tmp_path / "t.safetensors", phase=phase), "--ep-size", RANKS)
    assert set(found["layouts"][0]["phases"]) == {"prefill", "decode"}
    for number, name in enumerate(("prefill", "decode")):
        part = LOAD[phase == number].reshape(-1, LAYERS, RANKS, 2).sum(axis=3)
        each = found["layouts"][0]["phases"][name]
        assert each["steps"] == len(part)
        assert each["imbalance_ratio"] == pytest.approx(np.mean(expected_statistics(part)["imbalance_ratio"]))


def test_steps_without_tokens_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = np.concatenate([LOAD, np.zeros_like(LOAD)])[np.random.default_rng(0).permutation(2 * STEPS)]
    found = reported(capsys, trace_file(tmp_path / "t.safetensors", load), "--ep-size", RANKS)
    assert (found["steps"], found["idle_steps"]) == (STEPS, STEPS)
    mean = expected_statistics(LOAD.reshape(STEPS, LAYERS, RANKS, -1).sum(axis=3))["mean"]
    assert [layer["mean"] for layer in found["layouts"][0]["layers"]] == pytest.approx(mean)
    empty = trace_file(tmp_path / "empty.safetensors", np.zeros_like(LOAD))
    assert "no token in iterations" in refused(capsys, empty, "--ep-size", RANKS)


def test_drift_is_told_from_chance() -> None:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(64))
    steady = rng.multinomial(4096, share, size=(320, 1))
    windows = [rng.multinomial(4096, rng.dirichlet(np.ones(64)), size=(20, 1)) for _ in range(16)]
    moving = np.concatenate(windows)
    load = np.concatenate([steady, moving], axis=1)
    trace = LoadTrace(load, np.zeros(320, dtype=np.uint8))
    report = make_report(trace, {})
    assert report.drift[0] == pytest.approx(report.chance[0], rel=0.15)
    assert report.drift[1] > 10 * report.chance[1]
    assert np.isnan(make_report(trace, {}, iterations=range(1)).drift).all()


def test_hottest_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = reported(capsys, trace_file(tmp_path / "t.safetensors"), "--ep-size", RANKS)
    total = LOAD.sum(axis=0)
    for layer, each in enumerate(found["experts"]):
        order = np.argsort(-total[layer], kind="stable")[:3]
        assert [hot["expert"] for hot in each["hottest"]] == order.tolist()
        assert each["hottest"][0]["relative_load"] == pytest.approx(total[layer].max() / total[layer].mean())


def test_shares_give_the_rank_load_of_the_measures() -> None:
    topology = Topology(4, active_ranks=(0, 2, 3))
    expert_map = ExpertMap.round_robin(LAYERS, EXPERTS, topology, 4)
    tokens = np.einsum("sle,ler->slr", LOAD, rank_share(expert_map))
    np.testing.assert_allclose(tokens, rank_load(expert_map, LOAD)[..., [0, 2, 3]])


def test_time_bins_hold_every_step_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_platform.offline.report._CHUNK_ENTRIES", 7 * LAYERS * EXPERTS)
    trace = LoadTrace(LOAD, np.zeros(STEPS, dtype=np.uint8))
    report = make_report(trace, {"map": MAP}, num_bins=8)
    tokens = rank_load(MAP, LOAD).reshape(8, 5, LAYERS, RANKS)
    np.testing.assert_allclose(report.layouts[0].rank_load, tokens.mean(axis=1))
    np.testing.assert_allclose(report.expert_load, LOAD.sum(axis=0))
    hottest = rank_load(MAP, LOAD).max(axis=2).sum(axis=0)
    mean = rank_load(MAP, LOAD).mean(axis=2).sum(axis=0)
    np.testing.assert_allclose(report.layouts[0].overall.balancedness, mean / hottest)


def test_what_cannot_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trace_file(tmp_path / "t.safetensors")
    assert "give --ep-size or --map" in refused(capsys, path)
    assert "cannot be shared evenly by --ep-size 3" in refused(capsys, path, "--ep-size", 3)
    tensorrt_llm_yaml.write(tmp_path / "map.yaml", MAP)
    assert "--ep-size" in refused(capsys, path, "--map", tmp_path / "map.yaml")
    ExpertMap.initial(LAYERS, EXPERTS + 1, Topology(3)).save(tmp_path / "map.json")
    assert "expected 8" in refused(capsys, path, "--map", tmp_path / "map.json")
    (tmp_path / "folder.html").mkdir()
    assert "folder.html" in refused(capsys, path, "--ep-size", 4, "--html", tmp_path / "folder.html")


def test_an_initial_layout_with_the_map_s_redundancy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = ExpertMap.initial(LAYERS, EXPERTS, Topology(3), 1)
    planned.save(tmp_path / "map.json")
    found = reported(capsys, trace_file(tmp_path / "t.safetensors"), "--map", tmp_path / "map.json")
    first, second = found["layouts"]
    assert (first["slots_per_rank"], first["layers"]) == (3, second["layers"])


class _Page(HTMLParser):
    """What stands in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def test_the_page_fetches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MAP.save(tmp_path / "map.json")
    path = tmp_path / "new" / "page.html"
    reported(capsys, trace_file(tmp_path / "t.safetensors"), "--map", tmp_path / "map.json", "--html", path)
    text = path.read_text()
    policies = [
        attributes["content"]
        for tag, attributes in _Page(text).tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    for tag, attributes in _Page(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "a")
        assert not {"src", "href", "srcset", "data", "action", "poster"} & set(attributes)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", text)


def test_names_cannot_break_out_of_the_page() -> None:
    trace = LoadTrace(LOAD, np.zeros(STEPS, dtype=np.uint8))
    name = "</script><script>alert(1)</script>"
    text = page(make_report(trace, {name: MAP}), name)
    assert [tag for tag, _ in _Page(text).tags].count("script") == 2
    assert json.loads(_Page(text).scripts[0])["layouts"][0]["name"] == name


# Just enough of a browser's document to run the page's script.
DOCUMENT = """
const made = {};
function node(tag) {
  const self = { tag, children: [], listeners: {}, textContent: "", value: "", style: {},
    appendChild(child) { self.children.push(child); },
    replaceChildren() { self.children = []; },
    addEventListener(name, action) { self.listeners[name] = action; },
    getBoundingClientRect: () => ({ left: 0, top: 0, width: self.width, height: self.height }),
    getContext: () => ({
      createImageData: (width, height) => ({ data: new Uint8ClampedArray(4 * width * height) }),
      putImageData: (image) => { self.image = image; } }) };
  return self;
}
const document = {
  createElement: node,
  getElementById: (id) => made[id] ??= node(id),
};
"""
PROBE = """
const rows = (part) => made[part].children[0].children[0].children[1].children.map(
  (row) => row.children.map((cell) => cell.textContent));
const heading = (part, column) =>
  made[part].children[0].children[0].children[0].children[0].children[column].listeners.click();
const before = rows("layers");
heading("layers", 3);
const ascending = rows("layers").map((row) => Number(row[3]));
heading("layers", 3);
const descending = rows("layers").map((row) => Number(row[3]));
const maps = () => made.time.children.map((figure) => [...figure.children[1].image.data]);
const all = maps();
made.layer.value = "1";
made.layer.listeners.change();
const experts = made.experts.children[0];
experts.children[1].listeners.mousemove({ clientX: 0.5, clientY: 0.5 });
console.log(JSON.stringify({ summary: made.summary.textContent, layouts: rows("layouts"), before, ascending,
  descending, figures: all.length, changed: JSON.stringify(all) !== JSON.stringify(maps()),
  at: experts.children[2].textContent, drift: rows("drift") }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_page_s_script_runs(tmp_path: Path) -> None:
    trace = LoadTrace(LOAD, np.arange(STEPS, dtype=np.uint8) % 2, {"first_moe_layer": "3"})
    initial = ExpertMap.initial(LAYERS, EXPERTS, Topology(RANKS))
    report = make_report(trace, {"before": initial, "after": MAP})
    data, script = _Page(page(report, "t")).scripts
    stub = f"document.getElementById('data').textContent = {json.dumps(data)};"
    # In a function: its names must not meet those of the stub.
    program = tmp_path / "page.js"
    program.write_text(f"{DOCUMENT}{stub}(() => {{{script}}})();{PROBE}")
    done = subprocess.run(["node", str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["summary"] == "40 steps with tokens, 0 without, from step 0; 3 layers of 8 experts."
    assert [row[0] for row in found["layouts"]] == ["before", "after"]
    assert [row[0] for row in found["before"]] == ["3", "4", "5"]
    ratios = [round(float(ratio), 4) for ratio in report.layouts[0].overall.imbalance_ratio]
    assert [float(row[3]) for row in found["before"]] == ratios
    assert found["ascending"] == sorted(ratios) and found["descending"] == sorted(ratios)[::-1]
    assert found["figures"] == 2 and found["changed"]
    first = report.expert_load[0, 0] / report.expert_load[0].mean()
    assert found["at"] == f"layer 3, expert 0: {round(float(first), 3)}"
    assert len(found["drift"]) == LAYERS


def test_the_picture_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "report.png"
    reported(capsys, trace_file(tmp_path / "t.safetensors"), "--ep-size", RANKS, "--plot", path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.name for file in path.parent.iterdir()] == ["report.png"]
