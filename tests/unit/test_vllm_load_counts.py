"""Counts of a pass, read from a host at once and from a device that lags, without a wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from eplb_backends.cpu.streams import SerialStreams
from eplb_platform.backend import load_backend
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.integrations.vllm.load_counts import Circumstances, LoadCounts
from eplb_platform.topology import Topology

MAPS = [ExpertMap(table, 4, Topology(2)) for table in ([[0, 1, 2, 3]], [[3, 2, 1, 0]])]


class LaggingStreams(SerialStreams):
    """A device whose marks pass when the test says so; copies are made at once, as streams order them."""

    def __init__(self) -> None:
        self.marks = 0
        self.reached = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def record(self) -> int:
        self.marks += 1
        return self.marks

    def passed(self, mark: object) -> bool:
        assert isinstance(mark, int)
        return mark <= self.reached


class LaggingBackend:
    def __init__(self) -> None:
        self.streams = LaggingStreams()

    def allocate_on_host(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)


def of_pass(expert_map: ExpertMap, *, is_dummy: bool = False) -> Circumstances:
    return Circumstances(expert_map, Phase.DECODE, is_dummy)


def counter() -> torch.Tensor:
    return torch.zeros(1, 4, dtype=torch.int32)


def test_on_a_host_a_pass_is_read_at_its_end() -> None:
    counted = counter()
    counts = LoadCounts(counted, load_backend("cpu"))
    counted += 3
    arrived = counts.end_of_pass(of_pass(MAPS[0]))
    assert arrived is not None
    assert arrived.load.tolist() == [[3, 3, 3, 3]]
    assert arrived.circumstances == of_pass(MAPS[0])
    assert not counted.any()


def test_what_comes_late_comes_with_its_own_map() -> None:
    counted, backend = counter(), LaggingBackend()
    counts = LoadCounts(counted, backend)  # type: ignore[arg-type]  # only what a reader uses
    counted += 1
    assert counts.end_of_pass(of_pass(MAPS[0])) is None
    counted += 10
    backend.streams.reached = 1
    arrived = counts.end_of_pass(of_pass(MAPS[1]))
    assert arrived is not None
    assert arrived.load.tolist() == [[1, 1, 1, 1]]
    assert arrived.circumstances.expert_map is MAPS[0]


def test_a_dummys_tokens_are_never_counted() -> None:
    counted = counter()
    counts = LoadCounts(counted, load_backend("cpu"))
    counted += 5
    assert counts.end_of_pass(of_pass(MAPS[0], is_dummy=True)) is None
    assert not counted.any()


@pytest.mark.parametrize("lag", [0, 1, 5, 30])
@pytest.mark.parametrize("map_changes_every", [3, 1000])
def test_no_token_is_counted_twice_nor_by_another_map(lag: int, map_changes_every: int) -> None:
    counted, backend = counter(), LaggingBackend()
    counts = LoadCounts(counted, backend)  # type: ignore[arg-type]  # only what a reader uses
    sent: Counter[int] = Counter()
    read: Counter[int] = Counter()
    marks_at_step: list[int] = []
    for step in range(400):
        in_force = step // map_changes_every % 2
        tokens = 1000 * (in_force + 1) if step < 200 else 0  # tells by the amount which map sent them
        counted += tokens
        sent[in_force] += tokens
        marks_at_step.append(backend.streams.marks)
        backend.streams.reached = marks_at_step[max(step - lag, 0)]
        arrived = counts.end_of_pass(of_pass(MAPS[in_force]))
        if arrived is not None:
            of_map = MAPS.index(arrived.circumstances.expert_map)
            read[of_map] += int(arrived.load[0, 0])
            assert int(arrived.load[0, 0]) % (1000 * (of_map + 1)) == 0
    assert all(read[of_map] <= sent[of_map] for of_map in sent)
    if lag < 7 or map_changes_every == 1000:  # as many reads as are under way at a time
        assert read == sent
