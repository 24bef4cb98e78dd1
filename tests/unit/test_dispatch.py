"""Dispatch tables: replicas share a token stream evenly."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_platform.dispatch import even_table
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

MAP = ExpertMap([[0, 1, 2, 0, 2, 0], [0, 1, 2, 1, 2, 0]], 3, Topology(3))


def test_rows_list_the_replicas_and_keep_their_width() -> None:
    table, count = even_table(MAP, 4)
    assert table.tolist() == [
        [[0, 3, 5, -1], [1, -1, -1, -1], [2, 4, -1, -1]],
        [[0, 5, -1, -1], [1, 3, -1, -1], [2, 4, -1, -1]],
    ]
    assert count.tolist() == [[3, 1, 2], [2, 2, 2]]
    assert table.dtype == count.dtype == np.int32


def test_tokens_numbered_modulo_the_count_spread_evenly_over_an_experts_slots() -> None:
    table, count = even_table(MAP, 3)
    tokens = np.arange(60)
    for layer, expert in np.ndindex(2, 3):
        slots = table[layer, expert, tokens % count[layer, expert]]
        assert (MAP.physical_to_logical[layer, slots] == expert).all()
        assert set(np.bincount(slots)) - {0} == {60 // count[layer, expert]}


def test_a_width_that_an_expert_exceeds_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0: expert 0 has 3 replicas"):
        even_table(MAP, 2)
