"""Our files in SGLang's own loader, and the dumps of SGLang's own recorder in our reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eplb_platform.cli import run
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import formats, load_trace, sglang_recorder
from eplb_platform.records.load_trace import LoadTrace
from eplb_platform.topology import Topology
from tests.engines.sglang_engine import SglangEngine

LAYERS, DENSE, EXPERTS, RANKS, CHOSEN, PASSES = 3, 2, 8, 4, 2, 7
RNG = np.random.default_rng(0)


def some_map(seed: int = 1) -> ExpertMap:
    """8 experts in 12 slots of 4 ranks."""
    rng = np.random.default_rng(seed)
    extra = np.arange(4)
    rows = [rng.permutation(np.concatenate([np.arange(EXPERTS), extra])) for _ in range(LAYERS)]
    return ExpertMap(rows, EXPERTS, Topology(RANKS))


def some_tokens(rows: NDArray[np.int64], ranks: int = RANKS) -> NDArray[np.int64]:
    """[passes, ranks, layers, tokens, chosen]: physical experts; dense layers, of a kind, choose none."""
    tokens = RNG.integers(0, rows.shape[1], (PASSES, ranks, len(rows), 16, CHOSEN))
    tokens[:, :, :, 12:] = -1  # padding of a batch
    tokens[:, :, :DENSE] = -1
    return tokens


def counted(tokens: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[passes, MoE layers, experts]: what was asked of each logical expert."""
    load = np.zeros((len(tokens), len(rows), EXPERTS), dtype=np.int64)
    for place in np.argwhere(tokens >= 0):
        number, _, layer, *_ = place
        load[number, layer, rows[layer, tokens[tuple(place)]]] += 1
    return load[:, DENSE:]


def rows_with_dense_layers() -> NDArray[np.int64]:
    moe = some_map().physical_to_logical
    return np.concatenate([np.tile(np.arange(12) % EXPERTS, (DENSE, 1)), moe])


@pytest.mark.parametrize("name", ["location.json", "location.pt"])
@pytest.mark.parametrize("dense", [0, DENSE])
def test_a_converted_map_is_the_engine_s_location(
    name: str, dense: int, sglang: SglangEngine, tmp_path: Path
) -> None:
    """Real: compute_initial_expert_location_metadata and all that it calls in sglang.srt.eplb."""
    expert_map = some_map()
    expert_map.save(tmp_path / "map.json")
    converted = tmp_path / name
    arguments = ["convert", str(tmp_path / "map.json"), "-o", str(converted), "--to", "sglang"]
    assert run([*arguments, "--first-moe-layer", str(dense)]) == 0
    for rank in range(RANKS):
        metadata = sglang.initial_location(
            str(converted), layers=dense + LAYERS, experts=EXPERTS, redundant=4, ep_size=RANKS, rank=rank
        )
        assert (metadata.num_layers, metadata.num_local_physical_experts) == (dense + LAYERS, 3)
        assert (metadata.physical_to_logical_map[dense:].numpy() == expert_map.physical_to_logical).all()
        assert (
            metadata.logical_to_all_physical_map_num_valid[dense:].numpy() == expert_map.replica_count
        ).all()
        for layer, expert in np.ndindex(LAYERS, EXPERTS):
            places = metadata.logical_to_all_physical(dense + layer, expert)
            ours = expert_map.logical_to_physical[layer, expert]
            assert sorted(places) == sorted(ours[ours >= 0].tolist())
        chosen = metadata.logical_to_rank_dispatch_physical_map[dense:].numpy()
        routed = np.take_along_axis(expert_map.physical_to_logical, chosen, axis=1)
        assert (routed == np.arange(EXPERTS)).all()


@pytest.mark.parametrize("mode", ["stat", "stat_approx", "per_pass", "per_token"])
def test_a_dump_of_the_engine_s_recorder_is_read(mode: str, sglang: SglangEngine, tmp_path: Path) -> None:
    """Real: the recorder from its hooks to torch.save. Mode stat sums its ranks over a collective, which has
    one rank here.
    """
    rows = rows_with_dense_layers()
    summed = mode in ("stat", "stat_approx")
    tokens = some_tokens(rows, ranks=1 if summed else RANKS)
    sglang.record(tmp_path, tokens, rows, mode=mode, ep_size=1 if summed else RANKS)
    source = next(tmp_path.iterdir()) if summed else tmp_path
    trace = sglang_recorder.read(source)
    assert (trace.expert_load == counted(tokens, rows)).all()
    assert trace.metadata == {"first_moe_layer": str(DENSE)}
    assert run(["convert", str(source), "-o", str(tmp_path / "trace.safetensors")]) == 0
    assert (formats.read_trace(tmp_path / "trace.safetensors").expert_load == trace.expert_load).all()


def test_the_engine_s_own_reader_finds_the_same_counts(sglang: SglangEngine, tmp_path: Path) -> None:
    """Real: the recorder in mode per_pass, and read_mode_per_pass of the engine's simulator."""
    rows = rows_with_dense_layers()
    tokens = some_tokens(rows)
    sglang.record(tmp_path, tokens, rows, mode="per_pass", ep_size=RANKS)
    theirs: dict[str, Any] = sglang.reader.read_mode_per_pass(tmp_path)
    physical = theirs["global_physical_count_of_forward_pass"].numpy()
    logical = np.zeros((PASSES, len(rows), EXPERTS), dtype=np.int64)
    for layer, slot in np.ndindex(rows.shape):
        logical[:, layer, rows[layer, slot]] += physical[:, layer, slot]
    assert (sglang_recorder.read(tmp_path).expert_load == logical[:, DENSE:]).all()


@pytest.mark.parametrize("buffer_size", [4, 32])
def test_a_ring_that_is_not_full_or_has_run_over_is_read(
    buffer_size: int, sglang: SglangEngine, tmp_path: Path
) -> None:
    """Real: the recorder in mode stat, with a buffer of fixed size."""
    rows = rows_with_dense_layers()
    tokens = some_tokens(rows, ranks=1)
    sglang.record(tmp_path, tokens, rows, mode="stat", ep_size=1, buffer_size=buffer_size)
    load = sglang_recorder.read(next(tmp_path.iterdir())).expert_load
    kept = counted(tokens, rows)[-buffer_size:]
    assert sorted(load.tolist()) == sorted(kept.tolist())


@pytest.mark.parametrize("name", ["load.json", "load.pt"])
def test_converted_load_is_planned_on_by_the_engine(name: str, sglang: SglangEngine, tmp_path: Path) -> None:
    """Real: compute_initial_expert_location_metadata with `logical_count`, and the engine's algorithms. What
    it plans is an ExpertMap, and more balanced than the layout it starts with.
    """
    load = RNG.zipf(1.6, (5, LAYERS, EXPERTS)).clip(1, 500).astype(np.int64)
    trace = LoadTrace(load, np.full(5, formats.MIXED, dtype=np.uint8), {"first_moe_layer": str(DENSE)})
    load_trace.write(tmp_path / "trace.safetensors", trace)
    assert run(["convert", str(tmp_path / "trace.safetensors"), "-o", str(tmp_path / name)]) == 0
    metadata = sglang.initial_location(
        str(tmp_path / name), layers=DENSE + LAYERS, experts=EXPERTS, redundant=4, ep_size=RANKS
    )
    planned = ExpertMap(metadata.physical_to_logical_map[DENSE:].numpy(), EXPERTS, Topology(RANKS))
    total = load.sum(axis=0)
    per_slot = np.take_along_axis(total / planned.replica_count, planned.physical_to_logical, axis=1)
    worst = per_slot.reshape(LAYERS, RANKS, -1).sum(axis=2).max(axis=1)
    start = total.reshape(LAYERS, RANKS, -1).sum(axis=2).max(axis=1)
    assert (worst <= start).all() and (worst < start).any()
