from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from eplb_platform import Topology
from tests.unit.strategies import topologies


def test_all_ranks_are_active_on_one_node_unless_said_otherwise() -> None:
    topology = Topology(num_ranks=4)
    assert topology.active_ranks == (0, 1, 2, 3)
    assert topology.num_active_ranks == 4
    assert topology.node_of_rank.tolist() == [0, 0, 0, 0]
    assert topology.is_active.tolist() == [True] * 4


def test_ranks_need_not_be_a_multiple_of_nodes() -> None:
    assert Topology(5, num_nodes=2).node_of_rank.tolist() == [0, 0, 0, 1, 1]
    assert Topology(8, num_nodes=3).node_of_rank.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_active_ranks_are_sorted_so_that_equal_topologies_are_equal() -> None:
    assert Topology(4, active_ranks=[3, 0]) == Topology(4, active_ranks=(0, 3))
    assert hash(Topology(4, active_ranks=[3, 0])) == hash(Topology(4, active_ranks=(0, 3)))
    assert Topology(4, active_ranks=[0, 1, 2, 3]) == Topology(4)
    assert Topology(4, active_ranks=[3, 0]).is_active.tolist() == [True, False, False, True]


@given(topologies())
def test_every_node_has_neighbouring_ranks_in_shares_that_differ_by_one(topology: Topology) -> None:
    nodes = topology.node_of_rank
    assert (np.diff(nodes) >= 0).all()
    shares = np.bincount(nodes, minlength=topology.num_nodes)
    assert shares.size == topology.num_nodes
    assert shares.max() - shares.min() <= 1
    assert np.flatnonzero(topology.is_active).tolist() == list(topology.active_ranks)


def test_arrays_are_read_only_after_a_copy_too() -> None:
    for topology in (Topology(4), pickle.loads(pickle.dumps(Topology(4))), copy.deepcopy(Topology(4))):
        assert topology == Topology(4)
        for array in (topology.node_of_rank, topology.is_active):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ranks": 0}, "num_ranks is 0, expected at least 1"),
        ({"num_ranks": 2.0}, "num_ranks is 2.0, expected an integer"),
        ({"num_ranks": True}, "num_ranks is True, expected an integer"),
        ({"num_ranks": 4, "num_nodes": 0}, "num_nodes is 0, expected at least 1"),
        ({"num_ranks": 4, "num_nodes": 5}, r"num_nodes is 5, expected at most num_ranks \(4\)"),
        ({"num_ranks": 4, "active_ranks": []}, "active_ranks is empty"),
        ({"num_ranks": 4, "active_ranks": [0, 4]}, "active rank 4 is out of range, expected 0 to 3"),
        ({"num_ranks": 4, "active_ranks": [-1, 2]}, "active rank -1 is out of range"),
        ({"num_ranks": 4, "active_ranks": [1, 2, 1]}, "active rank 1 is given twice"),
        ({"num_ranks": 4, "active_ranks": ["1"]}, "an active rank is '1', expected an integer"),
    ],
)
def test_what_is_no_topology_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(**arguments)
