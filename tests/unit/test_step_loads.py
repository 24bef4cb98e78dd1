"""The load of single passes until the trace has them: what ranks add up, and what becomes steps."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.runtime.step_loads import StepLoads
from eplb_platform.topology import Topology

# One layer, 3 experts on 2 ranks of 2 slots: expert 0 has two replicas.
MAP = ExpertMap([[0, 1, 2, 0]], 3, Topology(2))
MOVED = ExpertMap([[2, 1, 0, 2]], 3, Topology(2))
LOAD = np.array([[1, 10, 100, 1000]])


def kept_by(steps: range | None = None, capacity: int = 100) -> StepLoads:
    return StepLoads(1, 3, steps=steps, capacity=capacity)


def test_each_pass_is_read_against_the_map_of_its_time() -> None:
    loads = kept_by()
    loads.record(LOAD, MAP, phase=Phase.PREFILL)
    loads.record(LOAD, MOVED, phase=Phase.DECODE)
    loads.record(None, MOVED, phase=Phase.DECODE)
    rows, phase = loads.rows(loads.block(*loads.kept()))
    assert rows.tolist() == [[[1001, 10, 100]], [[100, 10, 1001]], [[0, 0, 0]]]
    assert phase.tolist() == [Phase.PREFILL, Phase.DECODE, Phase.DECODE]


def test_what_is_recorded_is_not_shared() -> None:
    loads, load = kept_by(), LOAD.copy()
    loads.record(load, MAP)
    load[...] = 7
    assert loads.rows(loads.block(0, 1))[0].tolist() == [[[1001, 10, 100]]]


def test_ranks_add_up_and_a_pass_that_all_made_as_a_dummy_is_no_step() -> None:
    first, second = kept_by(), kept_by()
    for loads, dummies in ((first, (0, 2)), (second, (1, 2))):
        for number in range(4):
            loads.record(LOAD, MAP, phase=Phase.DECODE, is_dummy=number in dummies)
    rows, phase = first.rows(first.block(0, 4) + second.block(0, 4))
    assert rows[:, 0, 1].tolist() == [10, 10, 20]
    assert phase.tolist() == [Phase.DECODE] * 3


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ((Phase.PREFILL, Phase.PREFILL), Phase.PREFILL),
        ((Phase.PREFILL, Phase.DECODE), Phase.MIXED),
        ((Phase.MIXED, Phase.DECODE), Phase.MIXED),
    ],
)
def test_ranks_in_different_phases_make_a_mixed_step(phases: tuple[Phase, ...], expected: Phase) -> None:
    ranks = [kept_by() for _ in phases]
    for loads, phase in zip(ranks, phases, strict=True):
        loads.record(LOAD, MAP, phase=phase)
    total = np.sum([loads.block(0, 1) for loads in ranks], axis=0)
    assert ranks[0].rows(total)[1].tolist() == [expected]


def test_only_the_given_passes_are_kept_dummies_counted() -> None:
    loads = kept_by(steps=range(3, 6))
    for number in range(10):
        assert loads.is_complete == (number >= 6)
        loads.record(LOAD * number, MAP, is_dummy=number == 1)
    assert loads.kept() == (3, 6)
    assert loads.rows(loads.block(3, 6))[0][:, 0, 1].tolist() == [30, 40, 50]


def test_what_the_trace_has_is_forgotten_and_numbers_go_on() -> None:
    loads = kept_by()
    for number in range(5):
        loads.record(LOAD * number, MAP)
    loads.forget_until(3)
    assert loads.kept() == (3, 5)
    assert loads.rows(loads.block(3, 5))[0][:, 0, 1].tolist() == [30, 40]
    loads.forget_until(9)
    assert loads.kept() == (5, 5)
    loads.record(LOAD, MAP)
    assert loads.kept() == (5, 6)


def test_memory_is_bounded_and_losses_are_counted() -> None:
    loads = kept_by(capacity=4)
    for number in range(10):
        loads.record(LOAD * number, MAP)
    assert loads.kept() == (6, 10)
    assert loads.take_lost() == 6
    assert loads.take_lost() == 0


def test_slots_of_inactive_ranks_count_nothing() -> None:
    loads = kept_by()
    shrunk = ExpertMap([[0, 1, 2, -1, -1, -1]], 3, Topology(2, active_ranks=(0,)))
    loads.record(np.array([[1, 2, 3, 9, 9, 9]]), shrunk)
    assert loads.rows(loads.block(0, 1))[0].tolist() == [[[1, 2, 3]]]


def test_load_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="physical_load"):
        kept_by().record(np.zeros((1, 3), int), MAP)
