"""Our maps in vllm-ascend's own loader, and the files of its own writer in our reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eplb_platform as eplb
from eplb_platform.cli import run
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import expert_map_json
from tests.engines.vllm_ascend_engine import VllmAscendEngine

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LAYERS, EXPERTS, RANKS, SLOTS = 3, 16, 4, 5
LOAD = np.random.default_rng(0).zipf(1.5, (LAYERS, EXPERTS)).clip(1, 900).astype(np.int64)
LATER = np.random.default_rng(1).zipf(1.5, (LAYERS, EXPERTS)).clip(1, 900).astype(np.int64)


def planned(load: np.ndarray, current: ExpertMap | None = None) -> ExpertMap:
    topology = eplb.Topology(num_ranks=RANKS)
    plan = eplb.rebalance_experts(
        load, num_physical_experts=RANKS * SLOTS, topology=topology, current=current
    )
    return plan.expert_map


def later_load_of_slots(expert_map: ExpertMap) -> np.ndarray:
    """[layers, ranks, slots], under the map in use: each replica takes its part."""
    part = LATER // expert_map.replica_count
    return np.take_along_axis(part, expert_map.physical_to_logical, axis=1).reshape(LAYERS, RANKS, SLOTS)


@pytest.mark.parametrize("source", ["location.pt", "map.yaml"])
def test_a_converted_map_is_what_every_layer_starts_with(
    source: str, vllm_ascend: VllmAscendEngine, tmp_path: Path
) -> None:
    """Real: init_eplb_config, expert_file_to_tensor and generate_log2phy_map."""
    expert_map = planned(LOAD)
    expert_map.save(tmp_path / source)
    path = tmp_path / "map.json"
    assert run(["convert", str(tmp_path / source), "-o", str(path), "--ep-size", str(RANKS)]) == 0
    for layer, rank in np.ndindex(LAYERS, RANKS):
        found = vllm_ascend.start_layer(path, layer, experts=EXPERTS, ranks=RANKS, rank=rank)
        everywhere, here, log2phy, redundant = found
        assert redundant == expert_map.num_redundant_experts
        assert (here == everywhere[rank]).all()
        for holder, held in enumerate(expert_map.by_rank()[layer]):
            assert [int(everywhere[holder, expert]) for expert in held] == list(range(SLOTS))
            assert int((everywhere[holder] >= 0).sum()) == SLOTS
        routed = expert_map.physical_to_logical[layer][log2phy.numpy()]
        assert (routed == np.arange(EXPERTS)).all()
    *_, redundant_of_mtp = vllm_ascend.start_layer(path, LAYERS, experts=EXPERTS, ranks=RANKS, rank=0)
    assert redundant_of_mtp == expert_map.num_redundant_experts


def test_a_map_that_the_engine_would_misread_is_named(
    vllm_ascend: VllmAscendEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real: init_eplb_config. With two replicas on rank 0 it sends expert 3 to a slot of another expert."""
    twice = ExpertMap([[0, 0, 1, 2, 3, 1]], 4, eplb.Topology(2))
    twice.save(tmp_path / "map.yaml")
    path = tmp_path / "map.json"
    assert run(["convert", str(tmp_path / "map.yaml"), "-o", str(path), "--ep-size", "2"]) == 0
    assert "1 replicas share a rank" in capsys.readouterr().out
    *_, log2phy, _ = vllm_ascend.start_layer(path, 0, experts=4, ranks=2, rank=0)
    assert twice.physical_to_logical[0][int(log2phy[3])] != 3


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_a_map_that_the_engine_planned_and_recorded_is_read(
    policy: int, vllm_ascend: VllmAscendEngine, tmp_path: Path
) -> None:
    """Real: EplbWorker.do_update with the engine's policy, from our map, and _export_tensor_to_file."""
    ours = planned(LOAD)
    expert_map_json.write(tmp_path / "map.json", ours)
    maps = vllm_ascend.global_maps(tmp_path / "map.json", LAYERS, experts=EXPERTS, ranks=RANKS)
    updated = vllm_ascend.replan(maps, later_load_of_slots(ours), policy)
    vllm_ascend.record(updated, tmp_path / "recorded.json")
    assert run(["validate", str(tmp_path / "recorded.json")]) == 0
    theirs = ExpertMap.load(tmp_path / "recorded.json")
    assert (theirs.topology.num_ranks, theirs.slots_per_rank) == (RANKS, SLOTS)
    for layer, rank, slot in np.ndindex(LAYERS, RANKS, SLOTS):
        assert updated[layer, rank, theirs.by_rank()[layer, rank, slot]] == slot


def test_an_engine_that_records_writes_a_map_at_the_end_of_its_cycle(
    vllm_ascend: VllmAscendEngine, tmp_path: Path
) -> None:
    """Real: EplbUpdator from pass to pass, VllmEplbAdaptor, and EplbWorker, which runs in this process."""
    started, recorded = tmp_path / "map.json", tmp_path / "recorded.json"
    ours = planned(LOAD)
    expert_map_json.write(started, ours)
    passes = vllm_ascend.serve_recording(
        started, recorded, later_load_of_slots(ours), experts=EXPERTS, collect=6, plan=3
    )
    assert passes == 6 + 3 + LAYERS
    theirs = ExpertMap.load(recorded, num_logical_experts=EXPERTS)
    assert (theirs.topology.num_ranks, theirs.slots_per_rank) == (RANKS, SLOTS)
    assert theirs != ours


def test_what_the_engine_starts_with_is_recorded_and_read(
    vllm_ascend: VllmAscendEngine, tmp_path: Path
) -> None:
    """Real: generate_global_placement, and the file written from it."""
    layers = [vllm_ascend.start_layer(None, i, experts=EXPERTS, ranks=RANKS, rank=0)[0] for i in range(2)]
    vllm_ascend.record(torch.stack(layers), tmp_path / "first.json")
    first = ExpertMap.load(tmp_path / "first.json")
    placement = vllm_ascend.tables.generate_global_placement(EXPERTS, RANKS, RANKS, 0)
    assert (first.by_rank() == placement.numpy()[None]).all()


def test_a_map_that_is_written_over_the_engine_s_own_file_says_the_same(
    vllm_ascend: VllmAscendEngine, tmp_path: Path
) -> None:
    """Real: the engine's writer. Both files are the same JSON, key by key."""
    ours = planned(LOAD)
    expert_map_json.write(tmp_path / "ours.json", ours)
    maps = vllm_ascend.global_maps(tmp_path / "ours.json", LAYERS, experts=EXPERTS, ranks=RANKS)
    vllm_ascend.record(maps, tmp_path / "theirs.json")
    said = [json.loads((tmp_path / name).read_text()) for name in ("ours.json", "theirs.json")]
    assert said[0] == said[1]


def test_the_engine_accepts_a_plan_from_the_map_in_use(vllm_ascend: VllmAscendEngine, tmp_path: Path) -> None:
    """Real: EplbWorker.check_expert_placement, which wants every expert somewhere, no replicas together, and
    no expert that stays on its rank in another slot; it puts back the layers that it refuses, and says so.
    """
    before = planned(LOAD)
    after = planned(LATER, current=before)
    assert (after.physical_to_logical != before.physical_to_logical).any(axis=1).all()
    kept = torch.tensor(after.by_rank().copy())
    worker = vllm_ascend.worker.EplbWorker.__new__(vllm_ascend.worker.EplbWorker)
    vllm_ascend.errors.clear()
    worker.check_expert_placement(torch.tensor(before.by_rank().copy()), kept)
    assert vllm_ascend.errors == []
    assert (kept.numpy() == after.by_rank()).all()
    shuffled = kept[:, :, [1, 0, *range(2, SLOTS)]]
    worker.check_expert_placement(torch.tensor(after.by_rank().copy()), shuffled)
    assert vllm_ascend.errors, "the engine refuses what moves inside a rank"
