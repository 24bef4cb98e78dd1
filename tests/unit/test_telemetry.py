"""What a scrape shows of balancers, and the files that it reads."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch.distributed import TCPStore

from eplb_platform import EplbConfig, ExpertMap, Topology, load_backend
from eplb_platform.runtime import Balancer, BalancerStats, start_balancer
from eplb_platform.runtime.cycle import Stage
from eplb_platform.snapshot_files import ModelStatus, Snapshot, SnapshotPublisher, read_snapshots
from eplb_platform.telemetry import ALIVE_WITHIN_S, METRICS, PREFIX, STATES, Metric, SnapshotCollector

REPOSITORY = Path(__file__).resolve().parents[2]
NOW = 1_700_000_000.0


def status(**changes: object) -> dict[str, object]:
    """What a balancer says of itself, after a cycle that moved experts and one that failed."""
    stats = BalancerStats(
        steps=1200, cycles=1, moved_cycles=1, failed_cycles=1, commits=4, moved_experts=7,
        bytes_received=4096, staging_bytes=512, planning_s=0.5, transfer_s=2.0, wait_s=0.25,
        longest_wait_s=0.125, stall_s=0.75, records_written=2, trace_steps=600, balancedness=0.8,
        worst_layer_balancedness=0.5, time_balancedness=0.75, profiled_passes=90, profiled_experts=1.0,
        expert_compute_s=3.0, profiling_s=0.03, compute_cost_residual=0.05,
    )  # fmt: skip
    ages = {"map_age_s": 30.0, "last_cycle_age_s": 20.0, "step_running_s": 0.0}
    waits = {
        "last_success_age_s": 25.0,
        "next_cycle_steps": 400,
        "stage_running_s": 0.0,
        "waits_at": "",
        "waits_for": [],
    }
    return {
        "rank": 0,
        "state": "idle",
        "algorithm": "adaptive",
        **ages,
        **waits,
        **stats.as_dict(),
        **changes,
    }


def snapshot(rank: int = 0, updated: float = NOW, stage: int = 0, **changes: object) -> dict[str, object]:
    return {
        "rank": rank,
        "ep_size": 2,
        "stage": stage,
        "updated": updated,
        "models": {"moe": status(**changes)},
    }


def scrape(*snapshots: Mapping[str, object], now: float = NOW) -> dict[str, float]:
    """Every sample as Prometheus reads it, by `name{labels}` without the labels of the place."""
    registry = CollectorRegistry()
    workers = [Snapshot.model_validate(given) for given in snapshots]
    registry.register(SnapshotCollector(lambda: workers, now=lambda: now))
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            own = [
                f'{k}="{v}"' for k, v in sorted(sample.labels.items()) if k not in ("model", "pipeline_stage")
            ]
            key = sample.name + ("{" + ",".join(own) + "}" if own else "")
            assert key not in samples, f"{key} twice"
            samples[key] = sample.value
    return samples


def test_a_scrape_shows_what_the_ranks_counted() -> None:
    samples = scrape(snapshot(0), snapshot(1, steps=1100, bytes_received=1024))
    assert samples["eplb_load_balance_ratio"] == 0.8
    assert samples["eplb_worst_layer_load_balance_ratio"] == 0.5
    assert samples["eplb_time_balance_ratio"] == 0.75
    assert samples['eplb_cycles_total{outcome="moved"}'] == 1
    assert samples['eplb_cycles_total{outcome="failed"}'] == 1
    assert samples['eplb_cycles_total{outcome="no_load"}'] == 0
    assert samples["eplb_moved_experts_total"] == 7
    assert samples["eplb_planning_seconds_total"] == 0.5
    assert samples['eplb_steps_total{rank="0"}'] == 1200
    assert samples['eplb_steps_total{rank="1"}'] == 1100
    assert samples['eplb_received_bytes_total{rank="1"}'] == 1024
    assert samples['eplb_wait_seconds_total{rank="0"}'] == 0.25
    assert samples['eplb_longest_wait_seconds{rank="0"}'] == 0.125
    assert samples['eplb_records_total{result="written"}'] == 2


def test_every_metric_is_exported_and_every_export_is_described() -> None:
    names = {key.partition("{")[0] for key in scrape(snapshot(waits_for=[1]))}
    assert names == {metric.exported_name for metric in METRICS}
    described = {family.name for family in SnapshotCollector(list).describe()}
    assert described == {PREFIX + metric.name for metric in METRICS}


def test_what_is_not_known_yet_is_absent() -> None:
    samples = scrape(snapshot(balancedness=None, worst_layer_balancedness=None, last_cycle_age_s=None))
    assert "eplb_load_balance_ratio" not in samples
    assert "eplb_last_cycle_age_seconds" not in samples
    assert samples["eplb_map_age_seconds"] == 30


def test_ages_grow_while_nothing_is_heard() -> None:
    samples = scrape(snapshot(), now=NOW + 100)
    assert samples["eplb_map_age_seconds"] == 130
    assert samples["eplb_last_cycle_age_seconds"] == 120
    assert samples['eplb_snapshot_age_seconds{rank="0"}'] == 100


@pytest.mark.parametrize(
    ("is_alive", "age_s", "changes"),
    [
        (1, 0.0, {}),
        (1, ALIVE_WITHIN_S, {"state": "paused"}),
        (0, ALIVE_WITHIN_S + 1, {}),
        (0, 0.0, {"step_running_s": ALIVE_WITHIN_S + 1}),
        (0, 0.0, {"state": "closed"}),
        (1, -5.0, {}),
    ],
    ids=["fresh", "paused", "silent", "stuck in a step", "closed", "clock turned back"],
)
def test_a_dead_balancer_is_visible(is_alive: int, age_s: float, changes: dict[str, object]) -> None:
    samples = scrape({**snapshot(), "models": {"moe": status(**changes)}}, now=NOW + age_s)
    assert samples['eplb_alive{rank="0"}'] == is_alive
    assert samples["eplb_moved_experts_total"] == 7, "its counters stay"


def test_exactly_one_state_holds() -> None:
    for state in STATES:
        samples = scrape(snapshot(state=str(state)))
        holding = {key for key, value in samples.items() if key.startswith("eplb_state") and value}
        assert holding == {f'eplb_state{{state="{state}"}}'}
    assert set(Stage) < set(STATES)


def test_a_restarted_worker_replaces_the_one_that_died() -> None:
    before, after = snapshot(steps=1200), snapshot(steps=3, updated=NOW + 60)
    for order in ((before, after), (after, before)):
        assert scrape(*order, now=NOW + 61)['eplb_steps_total{rank="0"}'] == 3


def test_pipeline_stages_and_models_are_kept_apart() -> None:
    workers = [Snapshot.model_validate(snapshot(stage=stage, steps=stage)) for stage in (0, 1)]
    families = {family.name: family for family in SnapshotCollector(lambda: workers, lambda: NOW).collect()}
    steps = {sample.labels["pipeline_stage"]: sample.value for sample in families["eplb_steps"].samples}
    assert steps == {"0": 0, "1": 1}


def test_a_model_name_may_hold_anything() -> None:
    worker = snapshot()
    worker["models"] = {'a"b\\c\nd': status()}
    assert scrape(worker)["eplb_commits_total"] == 4


def test_balancedness_is_logged_with_what_vllm_s_line_has(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eplb_platform.runtime.accounting")
    with after_cycles(9, log_balancedness=True, log_balancedness_interval=6):
        lines = [record.getMessage() for record in caplog.records if "balancedness=" in record.getMessage()]
    steps = [int(line.removeprefix("EPLB step ").partition(",")[0]) for line in lines]
    assert len(steps) >= 2
    assert min(np.diff([0, *steps])) >= 6, "no two lines within the interval"
    assert "model tiny: avg_tokens=16.00, max_tokens=16, balancedness=1.0000" in lines[0]
    assert "worst layer 1.0000" in lines[0]


# --- files ---


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for ten minutes"
        time.sleep(0.01)


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[SnapshotPublisher, dict[str, Any]]]:
    """A publisher that is about to start, and what it is to publish; an error under `raise` is raised."""
    source: dict[str, Any] = {**snapshot(), "physical_to_logical": {"moe": [[0, 1]]}}

    def take() -> Mapping[str, object]:
        if "raise" in source:
            raise source["raise"]
        return source

    publisher = SnapshotPublisher(tmp_path, "rank-0", take, interval_s=0.01)
    yield publisher, source
    publisher.close()


def test_snapshots_are_published_until_closed(
    tmp_path: Path, published: tuple[SnapshotPublisher, dict[str, Any]]
) -> None:
    publisher, source = published
    started = time.time()
    publisher.start()
    wait_for(lambda: read_snapshots(tmp_path))
    assert read_snapshots(tmp_path)[0].updated >= started
    assert "physical_to_logical" not in (tmp_path / "rank-0.json").read_text()
    source["models"] = {"moe": status(steps=1201)}
    wait_for(lambda: read_snapshots(tmp_path)[0].models["moe"].steps == 1201)
    publisher.close()
    publisher.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failing_snapshot_is_logged_once_and_got_over(
    tmp_path: Path, published: tuple[SnapshotPublisher, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    publisher, source = published
    source["raise"] = RuntimeError("no balancer yet")
    with caplog.at_level(logging.WARNING):
        publisher.start()
        wait_for(lambda: caplog.records)
        time.sleep(0.1)
        assert [record.getMessage() for record in caplog.records] == [
            f"no metrics in {tmp_path / 'rank-0.json'}: RuntimeError: no balancer yet"
        ]
        del source["raise"]
        wait_for(lambda: read_snapshots(tmp_path))


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    publisher = SnapshotPublisher(folder, "rank-0", snapshot, interval_s=0.01)
    publisher.start()
    time.sleep(0.1)
    publisher.close()
    assert not folder.exists()


def test_files_that_are_no_snapshots_are_passed_over(tmp_path: Path) -> None:
    whole = json.dumps(snapshot())
    bad = {
        "half.json": whole[: len(whole) // 2],
        "empty.json": "",
        "other.json": '{"rank": 0}',
        "list.json": "[]",
        "text.json": "\xff not json",
        "nan.json": whole.replace("0.25", "NaN"),
        "infinite.json": whole.replace("0.25", "1e999"),
        "negative.json": whole.replace("1200", "-1"),
        "fraction.json": whole.replace("1200", "1.5"),
        "deep.json": "[" * 100_000,
        "large.json": whole + " " * (1 << 20),
    }
    for name, content in bad.items():
        (tmp_path / name).write_text(content, encoding="latin-1")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "nowhere.json").symlink_to(tmp_path / "missing")
    assert read_snapshots(tmp_path) == []
    (tmp_path / "rank-0.json").write_text(whole)
    assert [found.rank for found in read_snapshots(tmp_path)] == [0]
    assert read_snapshots(tmp_path / "missing") == []


class OneRankModel:
    """Two layers of four experts on a rank of its own."""

    expert_map = ExpertMap.initial(2, 4, Topology(1), 0)
    expert_weights = tuple([torch.zeros(4, 8)] for _ in range(2))

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None: ...


@contextmanager
def after_cycles(cycles: int, **keys: object) -> Iterator[Balancer]:
    """A balancer that is its own group, after so many cycles, each on the load of two steps."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    given = {"expert_heat_collection_interval": 2, "algorithm_execution_interval": 0, **keys}
    config = EplbConfig.from_additional_config({"eplb_config": given})
    model, backend = OneRankModel(), load_backend("cpu")
    balancer = start_balancer(config, model, backend, store, rank=0, model_name="tiny")
    try:
        deadline = time.monotonic() + 600
        while balancer.stats.cycles < cycles:
            assert time.monotonic() < deadline, balancer.stats
            balancer.step(np.ones((2, 4), dtype=np.int64))
            time.sleep(0.002)
        balancer.drain()
        yield balancer
    finally:
        balancer.close()


def test_what_a_balancer_says_of_itself_is_what_a_scrape_shows() -> None:
    with after_cycles(2, dynamic_eplb=True) as balancer:
        samples = scrape({**snapshot(), "models": {"moe": balancer.status()}})
    assert samples['eplb_cycles_total{outcome="stayed"}'] == balancer.stats.stayed_cycles >= 2
    assert samples['eplb_steps_total{rank="0"}'] == balancer.stats.steps >= 4
    assert samples["eplb_load_balance_ratio"] == 1
    assert samples['eplb_alive{rank="0"}'] == 1
    assert 0 <= samples["eplb_last_cycle_age_seconds"] <= samples["eplb_map_age_seconds"]
    assert f'eplb_info{{algorithm="adaptive",ep_size="2",version="{version("eplb_platform")}"}}' in samples
    assert ModelStatus.model_fields.keys() <= balancer.status().keys()
    assert balancer.snapshot()["physical_to_logical"] == [[0, 1, 2, 3]] * 2


# --- documentation ---


def unit(metric: Metric) -> str:
    return next((unit for unit in ("seconds", "bytes", "ratio") if metric.name.endswith(unit)), "")


def row(metric: Metric) -> str:
    cells = [f"`{metric.exported_name}`", metric.kind, unit(metric)]
    own = ", ".join(label for label in metric.labels if label not in ("model", "pipeline_stage"))
    return re.sub(r" +", " ", f"| {' | '.join([*cells, own, metric.meaning])} |")


def test_the_page_lists_exactly_what_is_exported() -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.partition("<!-- table: begin -->\n")[2].partition("<!-- table: end -->")[0]
    assert table.splitlines()[2:] == [row(metric) for metric in METRICS]


def test_the_dashboard_and_the_alerts_name_only_metrics_that_exist() -> None:
    dashboard = json.loads((REPOSITORY / "docs" / "grafana" / "eplb.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = re.findall(r"\beplb_[a-z_]+", " ".join(expressions))
    alerted = re.findall(r"\beplb_[a-z_]+", page.partition("```yaml")[2].partition("```")[0])
    assert named and alerted
    exported = {metric.exported_name for metric in METRICS}
    assert {*named, *alerted} <= exported
    assert {panel["id"] for panel in dashboard["panels"]} == set(range(1, len(dashboard["panels"]) + 1))
