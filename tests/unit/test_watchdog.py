"""What is said of a balancer that does not get on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.distributed import HashStore, TCPStore

from eplb_platform import EplbConfig, ExpertMap, Topology, load_backend
from eplb_platform.runtime import start_balancer
from eplb_platform.runtime.agreement import Agreement
from eplb_platform.runtime.ports import run_blocking
from eplb_platform.runtime.production import BackgroundThread, ThreadClock
from eplb_platform.runtime.store_plane import StoreControlPlane
from eplb_platform.runtime.watchdog import Progress, StallReports, Waiting

LIMIT_S = 10.0


def test_a_stage_is_reported_at_the_limit_and_whenever_its_time_has_doubled() -> None:
    reports = StallReports(3, LIMIT_S)
    said = [reports.look(Progress("stage fetch", float(second))) for second in range(45)]
    assert [second for second, line in enumerate(said) if line] == [10, 20, 40]
    assert said[10] == "rank 3: stage fetch has not got on for 10 s"


def test_what_gets_on_starts_anew() -> None:
    reports = StallReports(0, LIMIT_S)
    assert reports.look(Progress("stage fetch", 11.0))
    assert reports.look(None) is None
    assert reports.look(Progress("stage plan", 9.0)) is None
    assert reports.look(Progress("stage plan", 10.5))
    assert reports.look(Progress("stage plan", 0.5)) is None  # the same stage of the next chunk
    assert reports.look(Progress("stage plan", 10.5))


def test_the_missing_ranks_are_named() -> None:
    waiting = Waiting("cycle/7/start", [2, 5])
    line = StallReports(0, LIMIT_S).look(Progress("cycle 7, stage start", 12.0, waiting))
    assert line == (
        "rank 0: cycle 7, stage start has not got on for 12 s: it waits for rank 2, 5 at cycle/7/start"
    )


def test_a_rank_that_waits_long_learns_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the others comes once rank 0 has missed it."""
    monkeypatch.setattr("eplb_platform.runtime.agreement.LOOK_WHO_S", 0.02)
    store, clock = HashStore(), ThreadClock(threading.Condition())
    others: dict[int, threading.Thread] = {}
    seen: list[Waiting | None] = []

    def arrive(rank: int, on_wait: Callable[[Waiting | None], None]) -> None:
        place = Agreement(
            StoreControlPlane(store), clock, scope="cycle/7", rank=rank, ranks=(0, 2, 5), on_wait=on_wait
        )
        run_blocking(place.agree("start", timeout_s=60))

    def note(waiting: Waiting | None) -> None:
        seen.append(waiting)
        missing = () if waiting is None else waiting.missing
        if missing and missing[0] not in others:
            others[missing[0]] = threading.Thread(target=arrive, args=(missing[0], lambda _: None))
            others[missing[0]].start()

    arrive(0, note)
    for other in others.values():
        other.join()
    assert list(others) == [2, 5]
    assert seen[0] == Waiting("cycle/7/start", [2, 5])
    assert Waiting("cycle/7/start", [5]) in seen
    assert seen[-1] is None


class OneLayer:
    expert_weights: ClassVar = [[torch.arange(4.0).reshape(4, 1)]]
    expert_map = ExpertMap.initial(1, 4, Topology(1))

    def apply_map(self, layers: object, expert_map: ExpertMap) -> None:
        pass


class Hesitating:
    """A planner that answers once it may."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()

    async def plan(self, load: object, current: ExpertMap) -> ExpertMap:
        self.may_answer.wait(600)
        return current


def test_a_planner_that_does_not_answer_is_reported_while_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EplbConfig(
        dynamic_eplb=True, expert_heat_collection_interval=2, algorithm_execution_interval=0,
        transfer_timeout_s=2.0,
    )  # fmt: skip
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    planner = Hesitating()
    balancer = start_balancer(config, OneLayer(), load_backend("cpu"), store, 0, planner=planner)
    seen: list[dict[str, object]] = []

    def report(line: str) -> None:
        report_stall(line)
        seen.append(dict(balancer.status()))

    report_stall = balancer.report_stall
    monkeypatch.setattr(balancer, "report_stall", report)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            balancer.step(np.ones((1, 4), dtype=np.int64))
        deadline = time.monotonic() + 600
        while not seen and time.monotonic() < deadline:
            time.sleep(0.02)
        planner.may_answer.set()
    assert "rank 0: cycle 0, stage plan has not got on for" in caplog.text
    assert (seen[0]["state"], seen[0]["stalls"]) == ("plan", 1)
    balancer.close()
    assert not [thread.name for thread in threading.enumerate() if "watchdog" in thread.name]


def test_a_cycle_has_begun_before_its_thread_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    may_run, work = threading.Event(), BackgroundThread._work

    def work_late(thread: BackgroundThread) -> None:
        may_run.wait(600)
        work(thread)

    monkeypatch.setattr(BackgroundThread, "_work", work_late)
    config = EplbConfig(dynamic_eplb=True, expert_heat_collection_interval=2)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    balancer = start_balancer(config, OneLayer(), load_backend("cpu"), store, 0)
    assert balancer.state == "idle"
    for _ in range(2):
        balancer.step(np.ones((1, 4), dtype=np.int64))
    assert balancer.state == "start"
    may_run.set()
    balancer.close()
    assert balancer.state == "closed"
