"""vLLM's own /metrics shows what workers published, with one API server and with several."""

from __future__ import annotations

import multiprocessing
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from eplb_platform.integrations.vllm import metrics
from eplb_platform.runtime import BalancerStats

REPOSITORY = Path(__file__).resolve().parents[2]
VLLM_METRIC = "vllm:tokens_of_this_test"


def published(rank: int) -> dict[str, object]:
    stats = BalancerStats(steps=600, cycles=1, moved_cycles=1, moved_experts=7, balancedness=0.8)
    stats.worst_layer_balancedness = 0.5
    ages = {"map_age_s": 30.0, "last_cycle_age_s": 20.0, "last_success_age_s": 20.0}
    running = {"step_running_s": 0.0, "stage_running_s": 0.0, "next_cycle_steps": 9}
    waiting = {"waits_at": "", "waits_for": []}
    status = {"state": "idle", "algorithm": "adaptive", **ages, **running, **waiting, **stats.as_dict()}
    return {"rank": rank, "ep_size": 2, "stage": 0, "models": {"moe": status}}


def serve_and_scrape() -> list[str]:
    """What an API server does with its metrics, and two scrapes of it: runs in a process of its own."""
    metrics.prepare_front_end()
    metrics.prepare_front_end()
    from fastapi import FastAPI
    from prometheus_client import Counter
    from starlette.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    app = FastAPI()
    attach_router(app)
    Counter(VLLM_METRIC, "Stands for vLLM's own.").inc()
    with TestClient(app) as client:
        answers = [client.get(path) for path in ("/metrics", "/metrics/")]
    assert [answer.status_code for answer in answers] == [200, 200]
    return [answer.text for answer in answers]


def eplb_lines(scraped: str) -> list[str]:
    """The samples of ours that do not change with time."""
    return [line for line in scraped.splitlines() if line.startswith("eplb_") and "_age_" not in line]


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """This process as a front end whose two workers publish."""
    monkeypatch.setenv(metrics.STATE_DIR_VARIABLE, str(tmp_path / "state"))
    metrics.prepare_front_end()
    folder = metrics.state_folder()
    assert folder is not None
    publishers = [
        metrics.SnapshotPublisher(folder, f"rank-{rank}", lambda rank=rank: published(rank))
        for rank in (0, 1)
    ]
    for publisher in publishers:
        publisher.start()
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < deadline, "nothing was published"
        time.sleep(0.01)
    yield
    for publisher in publishers:
        publisher.close()


@pytest.mark.parametrize("num_api_servers", [1, 2])
@pytest.mark.usefixtures("front_end")
def test_every_api_server_serves_each_value_once(
    num_api_servers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if num_api_servers > 1:
        (tmp_path / "prometheus").mkdir()
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "prometheus"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_api_servers, mp_context=context) as api_servers:
        asked = [api_servers.submit(serve_and_scrape) for _ in range(num_api_servers)]
        scrapes = [scraped for answer in asked for scraped in answer.result(timeout=600)]
    for scraped in scrapes:
        lines = eplb_lines(scraped)
        assert 'eplb_load_balance_ratio{model="moe",pipeline_stage="0"} 0.8' in lines
        assert 'eplb_alive{model="moe",pipeline_stage="0",rank="1"} 1.0' in lines
        assert len(lines) == len({line.rpartition(" ")[0] for line in lines})
        assert lines == eplb_lines(scrapes[0])
        assert VLLM_METRIC in scraped


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"from eplb_platform.integrations.vllm import metrics as m\n{script}"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PREPARE = "m.prepare_front_end(); m.prepare_front_end(); print(m.state_folder(), end=' '); "


def test_the_folder_is_private_and_goes_with_the_front_end(tmp_path: Path) -> None:
    script = f"{PREPARE}print(oct(m.state_folder().stat().st_mode & 0o777))"
    folder, mode = run(script, TMPDIR=str(tmp_path)).split()
    assert Path(folder).parent == tmp_path
    assert mode == "0o700"
    assert list(tmp_path.iterdir()) == []


def test_another_engine_s_folder_is_not_taken_over(tmp_path: Path) -> None:
    others = tmp_path / f"eplb-platform-{os.getpid()}-other"
    others.mkdir()
    folder = run(PREPARE, TMPDIR=str(tmp_path), EPLB_PLATFORM_STATE_DIR=str(others)).strip()
    assert Path(folder) != others
    assert list(tmp_path.iterdir()) == [others]


def test_a_folder_that_the_user_names_is_used_and_kept(tmp_path: Path) -> None:
    named = tmp_path / "shared" / "state"
    assert run(PREPARE, EPLB_PLATFORM_STATE_DIR=str(named)) == str(named)
    assert stat.S_IMODE(named.stat().st_mode) == 0o700


def test_what_killed_front_ends_left_is_taken_away(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    long_ago = time.time() - 2 * metrics.ABANDONED_AFTER_S
    kept = {f"eplb-platform-{os.getpid()}-alive", f"eplb-platform-{ended.pid}-recent", "eplb-platform-notes"}
    for name in (*kept, f"eplb-platform-{ended.pid}-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-0.json").write_text("{}")
        if not name.endswith("recent"):
            os.utime(tmp_path / name, (long_ago, long_ago))
    run(PREPARE, TMPDIR=str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_vllm_exports_what_the_page_and_the_dashboard_say_of_it() -> None:
    import vllm

    sources = (Path(vllm.__file__).parent / "v1" / "metrics").rglob("*.py")
    names = set(re.findall(r"[\"'](vllm:[a-z_]+)[\"']", "".join(path.read_text() for path in sources)))
    for page in ("docs/metrics.md", "docs/grafana/eplb.json"):
        told = set(re.findall(r"vllm:[a-z_]+", (REPOSITORY / page).read_text(encoding="utf-8")))
        assert told
        assert {
            name for name in told if re.sub(r"_(total|bucket|sum|count)$", "", name) not in names
        } == set()
