"""Slot swaps between `npu` devices in both layouts, by both transports."""

from __future__ import annotations

import pytest

from eplb_platform.testing.processes import RankPool
from tests.ascend.over_stub.swaps import swap

WAYS = [("stacked", "host"), ("stacked", "collective"), ("nz", "host"), ("nz", "collective")]


@pytest.mark.parametrize(("layout", "transport"), WAYS)
def test_experts_change_places_between_two(pair: RankPool, layout: str, transport: str) -> None:
    assert pair.run(swap, layout, transport) == [[], []]


@pytest.mark.parametrize(("layout", "transport"), WAYS)
def test_experts_change_places_between_four(four: RankPool, layout: str, transport: str) -> None:
    assert four.run(swap, layout, transport) == [[], [], [], []]
