"""Calls of `resize` that cannot be meant: one line each, and the balancer serves on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from eplb_platform import EplbConfig, ExpertMap, Topology, load_backend
from eplb_platform.runtime import Balancer, start_balancer


class TwoRanksOneActive:
    expert_map = ExpertMap(np.array([[0, 1, -1, -1]]), 2, Topology(2, active_ranks=[0]))
    expert_weights: ClassVar = [[torch.zeros(2, 4)]]

    def apply_map(self, layers: object, expert_map: ExpertMap) -> None:
        pass


@pytest.fixture(scope="module")
def balancer() -> Iterator[Balancer]:
    config = EplbConfig(dynamic_eplb=True, eplb_policy_type="random", transfer_timeout_s=0.3)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = start_balancer(config, TwoRanksOneActive(), load_backend("cpu"), store, 0)
    yield started
    started.close()
    with pytest.raises(ValueError, match=r"^resize: this balancer is closed$"):
        started.resize([0])


@pytest.mark.parametrize(
    ("active", "keys", "line"),
    [
        ([], {}, "active_ranks is empty, expected at least one rank"),
        ([0, 0], {}, "active rank 0 is given twice"),
        ([0, 2], {}, "active rank 2 is out of range, expected 0 to 1"),
        ([0, -1], {}, "active rank -1 is out of range, expected 0 to 1"),
        ([0, 0.5], {}, "an active rank is 0.5, expected an integer"),
        ([0], {"dead": [0]}, "dead rank 0 is to be active"),
        ([0], {"dead": [7]}, "dead rank 7 is not one of 2 ranks"),
        ([0], {"timeout_s": float("nan")}, "timeout_s is nan, expected a number of at least 0"),
        ([0], {"timeout_s": -1.0}, "timeout_s is -1, expected a number of at least 0"),
    ],
)
def test_it_is_refused_before_anything_happens(
    balancer: Balancer, active: list[int], keys: dict[str, object], line: str
) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        balancer.resize(active, **keys)  # type: ignore[arg-type]
    balancer.step(np.ones((1, 4), dtype=np.int64))
    balancer.resize([0])
    assert balancer.is_active


def test_a_second_thread_is_refused_while_a_call_runs(balancer: Balancer) -> None:
    """The first waits for rank 1, which does not come."""
    said: list[str] = []

    def join() -> None:
        try:
            balancer.resize([0, 1], timeout_s=3.0)
        except RuntimeError as error:
            said.append(str(error))

    first = threading.Thread(target=join)
    first.start()
    while not balancer._wish_to_end:
        pass
    with pytest.raises(ValueError, match=r"^resize: another call of `resize` runs: "):
        balancer.resize([0])
    first.join()
    assert said == ["resize: rank 1 did not come in time; the active ranks are what they were"]
    balancer.resize([0])
