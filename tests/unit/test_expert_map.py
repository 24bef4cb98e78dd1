from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_platform import ExpertMap, Topology
from tests.unit.strategies import expert_maps, topologies

KNOWN = ExpertMap([[7, 2, 0, 3, 5, 6, 1, 4, 7, 2]], 8, Topology(2))


def test_known_answer() -> None:
    assert KNOWN.local_experts(rank=1, layer=0).tolist() == [-1, 1, 4, -1, 2, -1, 0, 3]
    assert KNOWN.local_experts(rank=0, layer=0).tolist() == [2, -1, 1, 3, -1, 4, -1, 0]
    assert KNOWN.by_rank().tolist() == [[[7, 2, 0, 3, 5], [6, 1, 4, 7, 2]]]
    assert KNOWN.replica_count.tolist() == [[1, 1, 2, 1, 1, 1, 1, 2]]
    assert KNOWN.logical_to_physical[0, [2, 6, 7]].tolist() == [[1, 9], [5, -1], [0, 8]]
    assert (KNOWN.num_layers, KNOWN.num_logical_experts, KNOWN.num_physical_experts) == (1, 8, 10)
    assert (KNOWN.slots_per_rank, KNOWN.num_redundant_experts) == (5, 2)


@given(expert_maps())
def test_derived_views_agree_with_the_map_slot_by_slot(expert_map: ExpertMap) -> None:
    """Against loops that say what the vectorised views mean."""
    num_experts = expert_map.num_logical_experts
    for layer, table in enumerate(expert_map.physical_to_logical.tolist()):
        slots_of = [[slot for slot, held in enumerate(table) if held == e] for e in range(num_experts)]
        assert expert_map.replica_count[layer].tolist() == [len(slots) for slots in slots_of]
        for expert, slots in enumerate(slots_of):
            row = expert_map.logical_to_physical[layer, expert].tolist()
            assert row == slots + [-1] * (len(row) - len(slots))
        wasted = 0
        for rank, held in enumerate(expert_map.by_rank()[layer].tolist()):
            first = [held.index(e) if e in held else -1 for e in range(num_experts)]
            assert expert_map.local_experts(rank, layer).tolist() == first
            wasted += sum(held.count(e) - 1 for e in range(num_experts) if e in held)
        assert expert_map.same_rank_replicas[layer] == wasted


@given(expert_maps(), st.integers(0, 3))
def test_padded_tables_keep_their_width(expert_map: ExpertMap, more: int) -> None:
    width = expert_map.logical_to_physical.shape[2] + more
    table = expert_map.logical_to_physical_padded(width)
    assert table.shape[2] == width
    assert (table[:, :, : width - more] == expert_map.logical_to_physical).all()
    assert (table[:, :, width - more :] == -1).all()


def test_a_table_too_narrow_names_the_expert() -> None:
    with pytest.raises(
        ValueError, match="layer 0: expert 2 has 2 replicas, more than the table's width of 1"
    ):
        KNOWN.logical_to_physical_padded(1)


@given(expert_maps())
def test_equal_content_is_equal_whatever_it_was_made_of(expert_map: ExpertMap) -> None:
    table = expert_map.physical_to_logical
    for given_as in (table.tolist(), np.asfortranarray(table.astype(np.int64)), table.astype(np.int8)):
        other = ExpertMap(given_as, expert_map.num_logical_experts, expert_map.topology)
        assert other == expert_map
        assert hash(other) == hash(expert_map)
        assert other.digest() == expert_map.digest()


def test_digest_depends_on_everything_and_on_nothing_else() -> None:
    topology = Topology(2)
    maps = [
        ExpertMap([[0, 1, 1, 0]], 2, topology),
        ExpertMap([[0, 1, 0, 1]], 2, topology),
        ExpertMap([[0, 1, 1, 0]] * 2, 2, topology),
        ExpertMap([[0, 1], [1, 0]], 2, topology),
        ExpertMap([[0, 1, 1, 0]], 2, Topology(2, num_nodes=2)),
        ExpertMap([[0, 1, 1, 0]], 2, Topology(4)),
    ]
    assert len({expert_map.digest() for expert_map in maps}) == len(maps)
    script = (
        "from eplb_platform.expert_map import ExpertMap, Topology\n"
        "print(ExpertMap([[0, 1, 1, 0]], 2, Topology(2)).digest())"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == maps[0].digest()


def test_arrays_are_read_only_and_not_the_callers() -> None:
    table = np.array([[0, 1]])
    expert_map = ExpertMap(table, 2, Topology(1))
    table[0, 0] = 1
    assert expert_map.physical_to_logical.tolist() == [[0, 1]]
    for copied in (expert_map, pickle.loads(pickle.dumps(expert_map)), copy.deepcopy(expert_map)):
        assert copied == expert_map
        arrays = (copied.physical_to_logical, copied.replica_count, copied.logical_to_physical)
        for array in (*arrays, copied.by_rank(), copied.same_rank_replicas):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
    with pytest.raises(AttributeError):
        expert_map.num_logical_experts = 3  # type: ignore[misc]


def test_initial_is_the_layout_that_vllm_starts_from() -> None:
    expert_map = ExpertMap.initial(2, 6, Topology(4), num_redundant_experts=2)
    assert expert_map.physical_to_logical.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] * 2
    assert expert_map.num_redundant_experts == 2


def test_round_robin_deals_the_experts() -> None:
    expert_map = ExpertMap.round_robin(1, 6, Topology(3))
    assert expert_map.by_rank().tolist() == [[[0, 3], [1, 4], [2, 5]]]


@given(topologies(), st.integers(1, 3), st.integers(1, 12), st.integers(0, 3))
def test_initial_layouts_use_the_active_ranks_evenly(
    topology: Topology, num_layers: int, num_experts: int, more: int
) -> None:
    ranks = topology.num_active_ranks
    redundant = -num_experts % ranks + more * ranks
    for make in (ExpertMap.initial, ExpertMap.round_robin):
        expert_map = make(num_layers, num_experts, topology, redundant)
        assert expert_map.num_redundant_experts == redundant
        assert expert_map.num_layers == num_layers
        assert (expert_map.by_rank()[:, ~topology.is_active] == -1).all()
        assert expert_map.replica_count.max() - expert_map.replica_count.min() <= 1


@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 4))
def test_round_robin_keeps_replicas_apart(num_ranks: int, per_rank: int, redundant_per_rank: int) -> None:
    num_experts = num_ranks * per_rank
    redundant = min(redundant_per_rank * num_ranks, num_experts * (num_ranks - 1))
    expert_map = ExpertMap.round_robin(1, num_experts, Topology(num_ranks), redundant)
    assert expert_map.same_rank_replicas.tolist() == [0]


def test_more_redundant_experts_than_the_ranks_can_share_are_refused() -> None:
    with pytest.raises(ValueError, match="4 active ranks, 4 redundant ones can"):
        ExpertMap.initial(1, 8, Topology(4), num_redundant_experts=3)
    with pytest.raises(ValueError, match="num_redundant_experts is -4"):
        ExpertMap.round_robin(1, 8, Topology(4), num_redundant_experts=-4)
    with pytest.raises(ValueError, match="num_layers is 0"):
        ExpertMap.initial(0, 8, Topology(4))


def test_layers_are_replaced() -> None:
    old, new = ExpertMap.initial(3, 4, Topology(2)), ExpertMap.round_robin(3, 4, Topology(2))
    mixed = old.replace_layers([0, 2], new)
    assert mixed.physical_to_logical.tolist() == [[0, 2, 1, 3], [0, 1, 2, 3], [0, 2, 1, 3]]
    assert old.replace_layers([], new) == old
    assert old.replace_layers(range(3), new) == new


def test_layers_of_another_kind_of_map_are_refused() -> None:
    old = ExpertMap.initial(3, 4, Topology(2))
    with pytest.raises(ValueError, match="the shapes differ"):
        old.replace_layers([0], ExpertMap.initial(3, 4, Topology(4)))
    for layer in (3, -1):
        with pytest.raises(ValueError, match="out of range, expected 0 to 2"):
            old.replace_layers([layer], old)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1], [0]], "ragged"),
        ([0, 1], r"shape \[2\], expected \[layers, physical\]"),
        ([[]], "shape"),
        ([[0.0, 1.0]], "dtype float64, expected integers"),
        ([[True, False]], "dtype bool, expected integers"),
        ([["0", "1"]], "expected integers"),
        ([[0, 1, 1]], "3 physical experts cannot be shared evenly by 2 ranks"),
        ([[0, 1], [0, 0]], "layer 1: expert 1 is on no active rank"),
        ([[0, 1], [0, 2]], "layer 1, rank 1, slot 0: 2, expected a logical expert from 0 to 1"),
        ([[0, 1, 1, 0], [0, 1, 1, -1]], "layer 1, rank 1, slot 1: -1, expected a logical expert"),
        (np.array([[0, 2**40]]), f"slot 0: {2**40}, expected a logical expert"),
        (np.array([[0, 2**63]], dtype=np.uint64), f"slot 0: {2**63}, expected a logical expert"),
    ],
)
def test_what_is_no_map_is_refused(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertMap(table, 2, Topology(2))


def test_inactive_ranks_hold_nothing() -> None:
    topology = Topology(3, active_ranks=(0, 2))
    assert ExpertMap([[0, -1, 1]], 2, topology).replica_count.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="layer 0, rank 1, slot 0: 1, expected -1 on an inactive rank"):
        ExpertMap([[0, 1, 1]], 2, topology)
    with pytest.raises(ValueError, match="layer 0, rank 2, slot 0: -1, expected a logical expert"):
        ExpertMap([[0, -1, -1]], 1, topology)


def test_missing_experts_are_listed_briefly() -> None:
    with pytest.raises(ValueError, match=r"layer 0: experts 1, 2, 3, 4, 5, 6, 7, 8 and 91 more are on no"):
        ExpertMap(np.zeros((1, 100), dtype=int), 100, Topology(1))


def test_positions_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is out of range, expected 0 to 1"):
        KNOWN.local_experts(rank=2, layer=0)
    with pytest.raises(ValueError, match="layer -1 is out of range, expected 0 to 0"):
        KNOWN.local_experts(rank=0, layer=-1)


def test_the_suffix_says_the_format(tmp_path: Path) -> None:
    KNOWN.save(tmp_path / "map.JSON")
    KNOWN.save(tmp_path / "map", format="json")
    assert ExpertMap.load(tmp_path / "map.JSON") == KNOWN
    assert ExpertMap.load(str(tmp_path / "map"), format="json") == KNOWN
    with pytest.raises(ValueError, match=r"map: the suffix names no format, expected one of \.json"):
        ExpertMap.load(tmp_path / "map")
    with pytest.raises(ValueError, match="unknown expert-map format 'yml', expected one of json"):
        KNOWN.save(tmp_path / "map.json", format="yml")


def test_maps_are_imported_without_torch() -> None:
    script = """
import sys
import eplb_platform.config, eplb_platform.balance, eplb_platform.expert_map
import eplb_platform.records.expert_map_json, eplb_platform.records.load_trace
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
