"""Faults of the machine under the demo's model: it serves on with the right tokens, or ends with a word."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eplb_platform import ExpertMap, Topology
from eplb_platform.testing.processes import RankPool
from tests.processes.serve_faulty import (
    TRANSFER_TIMEOUT_S,
    Fault,
    Seen,
    serve_faulty,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.processes

NUM_RANKS = 4
STOPPED_S = 2 * TRANSFER_TIMEOUT_S


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=400.0) as pool:
        yield pool


def check_served_right(seen: list[Seen], record: Path) -> None:
    assert [one.wrong_passes for one in seen] == [0] * NUM_RANKS
    assert [one.error for one in seen] == [""] * NUM_RANKS
    assert all(one.threads_left == [] for one in seen)
    ExpertMap.load(record, num_logical_experts=64, topology=Topology(NUM_RANKS))
    assert list(record.parent.glob("*.partial")) == []


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def let_go_after(ranks: RankPool, rank: int, seconds: float) -> None:
    """Continue a rank that has stopped itself."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        pids = ranks.pids
        if len(pids) == NUM_RANKS and is_stopped(pids[rank]):
            time.sleep(seconds)
            os.kill(pids[rank], signal.SIGCONT)
            return
        time.sleep(0.05)


def test_a_rank_that_stops_for_longer_than_our_time_out(ranks: RankPool, tmp_path: Path) -> None:
    record = tmp_path / "map.json"
    helper = threading.Thread(target=let_go_after, args=(ranks, 2, STOPPED_S))
    helper.start()
    seen = ranks.run(serve_faulty, Fault("stopped", record))
    helper.join()
    check_served_right(seen, record)
    for one in seen:
        assert int(one.stats["failed_cycles"] or 0) >= 1
        assert one.moved_after >= 1, one.stats["last_error"]
        assert any("failed after" in line and "the map in force stays" in line for line in one.log)
        assert all("\n" not in line for line in one.log)


def test_a_full_disk_keeps_the_last_record_and_stops_nothing(ranks: RankPool, tmp_path: Path) -> None:
    record = tmp_path / "map.json"
    seen = ranks.run(serve_faulty, Fault("full disk", record))
    check_served_right(seen, record)
    assert int(seen[0].stats["failed_records"] or 0) >= 1
    assert seen[0].stats["failed_cycles"] == 0
    assert any("the expert map was not recorded" in line and str(record) in line for line in seen[0].log)


def test_a_slow_store_makes_cycles_slower_and_no_token_wrong(ranks: RankPool, tmp_path: Path) -> None:
    record = tmp_path / "map.json"
    seen = ranks.run(serve_faulty, Fault("slow store", record))
    check_served_right(seen, record)
    assert all(one.moved_after >= 2 and one.stats["failed_cycles"] == 0 for one in seen)


def test_without_its_store_the_balancer_moves_nothing_and_serving_goes_on(
    ranks: RankPool, tmp_path: Path
) -> None:
    record = tmp_path / "map.json"
    seen = ranks.run(serve_faulty, Fault("store gone", record))
    check_served_right(seen, record)
    for one in seen:
        assert int(one.stats["failed_cycles"] or 0) >= 1
        assert one.stats["last_error"]
        assert one.passes >= 42


def test_a_killed_rank_ends_the_others_before_the_models_time_out(ranks: RankPool, tmp_path: Path) -> None:
    record = tmp_path / "map.json"
    outcomes = ranks.outcomes(serve_faulty, Fault("killed", record))
    assert outcomes[2].value is None and "exit code -9" in (outcomes[2].error or "")
    for outcome in outcomes[:2] + outcomes[3:]:
        one = outcome.value
        assert one is not None, outcome.error
        assert one.wrong_passes == 0
        assert one.error and "Timed out" not in one.error
        assert one.threads_left == []
        assert any("the map in force stays" in line for line in one.log) or one.stats["cancelled_cycles"]
    ExpertMap.load(record, num_logical_experts=64, topology=Topology(NUM_RANKS))
    assert ranks.pids == []
