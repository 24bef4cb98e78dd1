"""Routing tables with unequal shares, as a cycle makes and compares them."""

from __future__ import annotations

import numpy as np

from eplb_platform import ExpertMap, Topology
from eplb_platform.balance import window_rank_load
from eplb_platform.runtime.agreement import fingerprint
from eplb_platform.runtime.weighting import RoutingTables, worth_reweighing

WIDTH = 16
# Two layers, 3 experts on 2 ranks of 2 slots; expert 0 has a replica on each rank.
MAP = ExpertMap([[0, 1, 2, 0]] * 2, 3, Topology(2))
# Layer 0: even shares of expert 0 give 15 and 5; layer 1 is level with even shares.
LOAD = np.array([[[10, 10, 0], [10, 5, 5]]])


def test_even_tables_measure_as_the_map_does() -> None:
    even = RoutingTables.even(MAP, WIDTH)
    for found, expected in zip(even.window_rank_load(MAP, LOAD), window_rank_load(MAP, LOAD), strict=True):
        np.testing.assert_allclose(found, expected)


def test_levelled_tables_cool_the_hottest_rank() -> None:
    _, hottest = RoutingTables.level(MAP, LOAD, WIDTH).window_rank_load(MAP, LOAD)
    np.testing.assert_allclose(hottest, [10, 10])


def test_ranks_on_inactive_devices_do_not_count() -> None:
    shrunk = ExpertMap([[0, 1, 2, -1, -1, -1]], 3, Topology(2, active_ranks=(0,)))
    mean, hottest = RoutingTables.even(shrunk, 1).window_rank_load(shrunk, LOAD[:, :1])
    assert mean.tolist() == hottest.tolist() == [20]


def test_only_layers_that_gain_and_stay_are_reweighed() -> None:
    even, level = RoutingTables.even(MAP, WIDTH), RoutingTables.level(MAP, LOAD, WIDTH)
    assert worth_reweighing(MAP, MAP, even, level, LOAD) == [0]
    assert worth_reweighing(MAP, MAP, level, level, LOAD) == []
    moved = ExpertMap([[0, 2, 1, 0], [0, 1, 2, 0]], 3, Topology(2))
    assert worth_reweighing(MAP, moved, even, RoutingTables.level(moved, LOAD, WIDTH), LOAD) == []


def test_layers_are_taken_over_one_by_one_and_change_the_digest() -> None:
    even, level = RoutingTables.even(MAP, WIDTH), RoutingTables.level(MAP, LOAD, WIDTH)
    mixed = even.with_layers([0], level)
    np.testing.assert_array_equal(mixed.count[0], level.count[0])
    np.testing.assert_array_equal(mixed.logical_to_physical[1], even.logical_to_physical[1])
    assert fingerprint(MAP, even) != fingerprint(MAP, level)
    assert fingerprint(MAP, even) == fingerprint(MAP, RoutingTables.even(MAP, WIDTH))
