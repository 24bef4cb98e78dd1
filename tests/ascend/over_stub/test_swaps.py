"""Slot swaps between `npu` devices in both layouts, and that each wait and each check of them is needed."""

from __future__ import annotations

import pytest

from eplb_platform.testing.processes import RankPool
from tests.ascend.over_stub.swaps import refusals, swap

WAYS = [("stacked", "host"), ("stacked", "collective"), ("nz", "host"), ("nz", "collective")]


@pytest.mark.parametrize(("layout", "transport"), WAYS)
def test_experts_change_places_between_two(pair: RankPool, layout: str, transport: str) -> None:
    assert pair.run(swap, layout, transport, "") == [[], []]


@pytest.mark.parametrize(("layout", "transport"), WAYS)
def test_experts_change_places_between_four(four: RankPool, layout: str, transport: str) -> None:
    assert four.run(swap, layout, transport, "") == [[], [], [], []]


def test_what_cannot_be_moved_is_refused(pair: RankPool) -> None:
    assert pair.run(refusals, "") == [[], []]


@pytest.mark.parametrize(
    ("mutation", "layout", "transport"),
    [
        ("streams wait for no mark", "stacked", "host"),
        ("streams wait for no mark", "nz", "collective"),
        ("rounds wait for no copy", "stacked", "host"),
        ("checksums wait for no copy", "stacked", "host"),
        ("the stream does not wait for HCCL", "nz", "collective"),
    ],
)
def test_a_wait_less_is_seen(pair: RankPool, mutation: str, layout: str, transport: str) -> None:
    found = pair.run(swap, layout, transport, mutation)
    assert any(found), "every expert was right by luck"


@pytest.mark.parametrize(
    ("mutation", "first"),
    [
        ("views of NZ are taken", "a slice is sent"),
        ("stacks in NZ are taken", "a stack is staged"),
        ("formats may differ", "plain goes into NZ"),
        ("options are not looked at", "an option is misspelt"),
    ],
)
def test_a_check_less_is_seen(pair: RankPool, mutation: str, first: str) -> None:
    for faults in pair.run(refusals, mutation):
        assert faults
        assert faults[0].startswith(first)
