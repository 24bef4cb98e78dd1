"""A given expert map is deployed before serving: over gloo, with weights that say which expert they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.distributed import Store

from eplb_backends.cpu import CpuBackend
from eplb_platform import EplbConfig, ExpertMap, Topology
from eplb_platform.backend import Backend
from eplb_platform.runtime import DeploymentError, start_balancer
from eplb_platform.testing.faults import with_fault
from eplb_platform.testing.processes import RankPool
from tests.processes.serve_tagged import DYNAMIC, Run, serve
from tests.processes.tagged_model import NUM_EXPERTS, NUM_LAYERS, NUM_REDUNDANT, TaggedModel

pytestmark = pytest.mark.processes

NUM_RANKS = 4
STATIC: dict[str, object] = {"transfer_timeout_s": 60.0}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as pool:
        yield pool


def some_map(seed: int) -> NDArray[np.int32]:
    """[layers, physical], every expert somewhere and the redundant ones anywhere."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(NUM_LAYERS):
        experts = np.concatenate([np.arange(NUM_EXPERTS), draw.choice(NUM_EXPERTS, NUM_REDUNDANT, False)])
        rows.append(draw.permutation(experts))
    return np.array(rows, dtype=np.int32)


def deployed_everywhere(slots: NDArray[np.int32], num_ranks: int = NUM_RANKS) -> Run:
    return Run(steps=40, config=dict(STATIC), deploy=(slots,) * num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("options", [{}, {"verify_transfers": True, "layer_updates_per_step": 2}])
def test_a_static_map_is_deployed_and_nothing_moves_afterwards(
    num_ranks: int, options: dict[str, object]
) -> None:
    with RankPool(num_ranks, timeout_s=300.0) as pool:
        results = pool.run(serve, deployed_everywhere(some_map(1), num_ranks).on(**options))
    for result in results:
        np.testing.assert_array_equal(result.physical_to_logical, some_map(1))
        assert result.wrong_tokens == result.misplaced_experts == 0
        assert result.stats["commits"] == result.stats["cycles"] == result.stats["staging_bytes"] == 0


def test_dynamic_balancing_starts_from_the_deployed_map(ranks: RankPool) -> None:
    run = replace(
        deployed_everywhere(some_map(2)), steps=160, config=dict(DYNAMIC), until={"commits": NUM_LAYERS}
    )
    still = ranks.run(serve, replace(run, steps=1, until={}))
    moving = ranks.run(serve, run)
    for before, after in zip(still, moving, strict=True):
        np.testing.assert_array_equal(before.physical_to_logical, some_map(2))
        assert after.wrong_tokens == after.misplaced_experts == before.wrong_tokens == 0
        assert int(after.stats["commits"] or 0) >= NUM_LAYERS
        assert int(after.stats["staging_bytes"] or 0) > 0


def test_the_map_that_is_there_already_moves_nothing(ranks: RankPool) -> None:
    initial = ExpertMap.initial(NUM_LAYERS, NUM_EXPERTS, Topology(NUM_RANKS), NUM_REDUNDANT)
    results = ranks.run(serve, deployed_everywhere(initial.physical_to_logical).on(staging_memory_mb=1e-6))
    assert all(result.wrong_tokens == result.misplaced_experts == 0 for result in results)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_record_is_there_before_the_first_step(ranks: RankPool, tmp_path: Path, dynamic: bool) -> None:
    path = tmp_path / "map.json"
    run = deployed_everywhere(some_map(3)).on(dynamic_eplb=dynamic, expert_map_record_path=str(path))
    results = ranks.run(serve, replace(run, steps=0))
    np.testing.assert_array_equal(ExpertMap.load(path).physical_to_logical, some_map(3))
    assert [result.stats["records_written"] for result in results] == [1, 0, 0, 0]


def why_not_deployed(rank: int, num_ranks: int, store: Store, run: Run, fault: str) -> tuple[str, int]:
    """The error of this rank, and how many of its experts are not where the initial layout has them."""
    backend: Backend = CpuBackend()
    if fault and rank == 1:
        with_fault(backend, fault, error=OSError("the cable was cut"))
    deployed = next(slots for slots in run.deploy if slots is not None)
    model = TaggedModel(backend, store, rank, num_ranks, deployed.shape[1] - NUM_EXPERTS)
    config = EplbConfig.from_additional_config({"eplb_config": run.config}, environ={})
    try:
        start_balancer(config, model, backend, store, rank, deploy=run.map_to_deploy(rank, model.expert_map))
    except DeploymentError as error:
        return str(error), model.misplaced_experts(model.expert_map)
    return "", 0


@pytest.mark.parametrize("other", [some_map(5), None], ids=["another map", "no map"])
def test_ranks_that_deploy_different_maps_do_not_start(
    ranks: RankPool, other: NDArray[np.int32] | None
) -> None:
    run = Run(0, dict(STATIC), deploy=(some_map(4), some_map(4), other, some_map(4)))
    for error, misplaced in ranks.run(why_not_deployed, run, ""):
        assert error == "the ranks do not start from one expert map: rank 2 differs from rank 0"
        assert misplaced == 0


def test_a_layer_that_cannot_be_scheduled_is_named(ranks: RankPool) -> None:
    """Without redundancy a ring through all slots can only turn at once, four experts on each rank."""
    slots = ExpertMap.initial(NUM_LAYERS, NUM_EXPERTS, Topology(NUM_RANKS)).physical_to_logical.copy()
    slots[1] = np.roll(slots[1], 1)
    run = deployed_everywhere(slots).on(staging_memory_mb=5e-5)
    for error, misplaced in ranks.run(why_not_deployed, run, ""):
        assert "layers [1]: staging for 1 experts is too small" in error
        assert "raise staging_memory_mb" in error
        assert "\n" not in error
        assert misplaced == 0


@pytest.mark.parametrize("method", ["exchange", "swap_in"])
def test_a_failure_on_one_rank_is_the_reason_on_all(ranks: RankPool, method: str) -> None:
    for error, _ in ranks.run(why_not_deployed, deployed_everywhere(some_map(6)), method):
        assert error == "the expert map cannot be deployed: rank 1: OSError: the cable was cut"


def test_a_map_of_another_model_is_refused_on_every_rank(ranks: RankPool) -> None:
    for error, misplaced in ranks.run(why_not_deployed, deployed_everywhere(some_map(7)[:2]), ""):
        assert "the old map has 3 layers, the new one 2" in error
        assert misplaced == 0
