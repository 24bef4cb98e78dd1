"""A planner that does not answer holds up neither a cycle nor a meeting."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from eplb_platform import EplbConfig, load_backend
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime import start_balancer
from eplb_platform.runtime.bounded_planner import BoundedPlanner
from eplb_platform.runtime.gate import ForwardGate
from eplb_platform.runtime.planning import PlannerTimeout
from eplb_platform.runtime.ports import ExpertLoad, Planner, run_blocking
from eplb_platform.runtime.production import ThreadClock
from eplb_platform.topology import Topology

CURRENT = ExpertMap.initial(1, 4, Topology(2))
PLANNED = ExpertMap(np.array([[3, 2, 1, 0]]), 4, Topology(2))
LOAD = np.ones((1, 1, 4), dtype=np.int64)
TIMEOUT_S = 1.0


def bounded(planner: Planner, timeout_s: float = TIMEOUT_S) -> BoundedPlanner:
    gate = ForwardGate()

    def run(question: object) -> None:
        threading.Thread(target=run_blocking, args=(question,), daemon=True).start()

    return BoundedPlanner(planner, ThreadClock(gate.changed), gate, timeout_s=timeout_s, run=run)


class Slow:
    """Answers each question once it may."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = threading.Event()

    async def plan(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        self.asked += 1
        self.may_answer.wait(120)
        return PLANNED if self.asked > 1 else CURRENT


class Wrong:
    async def plan(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        raise ArithmeticError("no plan")


def test_a_planner_that_is_left_behind_is_asked_again_only_after_its_answer() -> None:
    slow = Slow()
    planner = bounded(slow)
    with pytest.raises(PlannerTimeout, match=r"Slow gave no plan within 1 s"):
        run_blocking(planner.plan(LOAD, CURRENT))
    with pytest.raises(PlannerTimeout, match="Slow has not answered an earlier question yet"):
        run_blocking(planner.plan(LOAD, CURRENT))
    assert slow.asked == 1
    slow.may_answer.set()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            assert run_blocking(planner.plan(LOAD, CURRENT)) == PLANNED, "the late answer was used"
            break
        except PlannerTimeout:
            continue
    assert slow.asked == 2


def test_an_answer_is_there_at_once_and_an_error_is_raised_as_it_is() -> None:
    quick = Slow()
    quick.may_answer.set()
    started = time.monotonic()
    assert run_blocking(bounded(quick, 60.0).plan(LOAD, CURRENT)) == CURRENT
    with pytest.raises(ArithmeticError, match="no plan"):
        run_blocking(bounded(Wrong(), 60.0).plan(LOAD, CURRENT))
    assert time.monotonic() - started < 30


class OneLayer:
    expert_weights: ClassVar = [[torch.arange(4.0).reshape(4, 1)]]
    expert_map = ExpertMap.initial(1, 4, Topology(1))

    def apply_map(self, layers: object, expert_map: ExpertMap) -> None:
        pass


def test_an_engine_drains_and_closes_beside_a_planner_that_never_answers() -> None:
    config = EplbConfig(
        dynamic_eplb=True, expert_heat_collection_interval=2, algorithm_execution_interval=0,
        transfer_timeout_s=2.0,
    )  # fmt: skip
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    slow = Slow()
    balancer = start_balancer(config, OneLayer(), load_backend("cpu"), store, 0, planner=slow)
    for _ in range(2):
        balancer.step(np.ones((1, 4), dtype=np.int64))
    deadline = time.monotonic() + 120
    while not slow.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    balancer.drain()
    assert balancer.state == "idle"
    assert "PlannerTimeout: Slow gave no plan" in balancer.stats.last_error
    balancer.close()
    slow.may_answer.set()
