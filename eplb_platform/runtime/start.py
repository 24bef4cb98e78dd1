"""Putting a balancer together for real processes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from eplb_platform.algorithms import load_algorithm
from eplb_platform.config import EplbConfig
from eplb_platform.heat import HeatWindows, LoadCollection
from eplb_platform.migration.schedule import warm_up as warm_up_schedule
from eplb_platform.migration.staging import BYTES_PER_MB, Staging
from eplb_platform.migration.transfer import Migrator
from eplb_platform.runtime.balancer import Balancer, LockedHeat
from eplb_platform.runtime.cycle import PLANNING_RANK, CycleRules, RankLink, Stage
from eplb_platform.runtime.gate import CommitGate
from eplb_platform.runtime.planning import AlgorithmPlanner, LoadHistory
from eplb_platform.runtime.ports import Planner
from eplb_platform.runtime.production import BackendGroup, BackgroundThread, ThreadClock
from eplb_platform.runtime.recording import MapRecorder
from eplb_platform.runtime.served_model import ServedModel
from eplb_platform.runtime.store_plane import StoreControlPlane

if TYPE_CHECKING:
    from torch.distributed import Store

    from eplb_platform.backend import Backend

logger = logging.getLogger(__name__)

WITHOUT_EFFECT_WHILE_SERVING = ("trace_record_path", "enable_expert_compute_profiling")


def start_balancer(
    config: EplbConfig,
    model: ServedModel,
    backend: Backend,
    store: Store,
    rank: int,
    *,
    num_expert_groups: int = 1,
    name: str = "eplb",
    planner: Planner | None = None,
    on_stage: Callable[[Stage], None] | None = None,
) -> Balancer:
    """Start balancing `model` on this rank; every rank of the group calls it, and it returns when all have.

    store: shared by all ranks; the balancer and its backend take clients of their own.
    name: keeps the keys of several models in one store apart.
    planner: plans in place of the configured algorithm.
    on_stage: called in the background thread whenever a cycle enters a stage.
    Raises ValueError for an unknown algorithm and for too little staging memory, `GroupError` when not every
    rank comes.
    """
    from torch.distributed import PrefixStore

    _warn_of_keys_without_effect(config)
    load_algorithm(config.algorithm)  # on every rank, so that an unknown name stops them all
    num_ranks = model.expert_map.topology.num_ranks
    backend.connect(PrefixStore(name, store), rank, num_ranks, config.transfer_timeout_s)
    backend.warm_up()
    migrator, rules = _migrator_and_rules(config, model, backend, rank)
    if planner is None:
        planner = _planner(config, num_expert_groups)
        if config.observes and rank == PLANNING_RANK:
            planner.warm_up()
    gate = CommitGate()
    link = RankLink(
        rank,
        num_ranks,
        plane=StoreControlPlane(PrefixStore(name, _client_of(store))),
        group=BackendGroup(backend, migrator),
        clock=ThreadClock(gate.changed),
        gate=gate,
    )
    balancer = Balancer(
        config,
        model,
        link,
        rules,
        heat=LockedHeat(_heat_windows(config, model)),
        migrator=migrator,
        planner=planner,
        recorder=MapRecorder(Path(config.expert_map_record_path)) if config.expert_map_record_path else None,
        background=BackgroundThread(f"{name}-cycle"),
        on_stage=on_stage,
        on_close=backend.close,
    )
    if migrator is not None:
        balancer.stats.staging_bytes = migrator.staging.nbytes
    return balancer


def _client_of(store: Store) -> Store:
    """A client of the same store, so that no call waits for another thread's."""
    clone: Callable[[], Store] = store.clone  # type: ignore[attr-defined]  # missing from torch's stubs
    return clone()


def _warn_of_keys_without_effect(config: EplbConfig) -> None:
    for key in WITHOUT_EFFECT_WHILE_SERVING:
        if getattr(config, key) != EplbConfig.model_fields[key].default:
            logger.warning("eplb_config.%s is read but does nothing yet", key)


def _migrator_and_rules(
    config: EplbConfig, model: ServedModel, backend: Backend, rank: int
) -> tuple[Migrator | None, CycleRules]:
    """Staging exists only where experts move; it is allocated here, before the engine measures its free
    memory.
    """
    migrator: Migrator | None = None
    if config.moves_experts:
        max_bytes = None if config.staging_memory_mb is None else int(config.staging_memory_mb * BYTES_PER_MB)
        staging = Staging(
            backend, model.expert_weights, max_bytes=max_bytes, layers_per_chunk=config.layer_updates_per_step
        )
        migrator = Migrator(backend, model.expert_weights, staging, rank, verify=config.verify_transfers)
        warm_up_schedule()
    return migrator, CycleRules(
        moves_experts=config.moves_experts,
        plans=config.moves_experts or config.records_map,
        layers_per_chunk=config.layer_updates_per_step,
        staging_slots=0 if migrator is None else migrator.staging.slots,
        commit_margin_steps=config.commit_margin_steps,
        timeout_s=config.transfer_timeout_s,
        first_commit_after_steps=config.algorithm_execution_interval,
    )


def _planner(config: EplbConfig, num_expert_groups: int) -> AlgorithmPlanner:
    return AlgorithmPlanner(
        algorithm=config.algorithm,
        num_expert_groups=num_expert_groups,
        timeout_s=config.transfer_timeout_s,
        min_balancedness=config.min_balancedness,
        max_moved_experts_per_layer=config.max_moved_experts_per_layer,
        history=None if config.moves_experts else LoadHistory(),
    )


def _heat_windows(config: EplbConfig, model: ServedModel) -> HeatWindows:
    return HeatWindows(
        model.expert_map.num_layers,
        model.expert_map.num_logical_experts,
        steps=config.expert_heat_collection_interval,
        num_windows=config.num_load_windows,
        collection=LoadCollection(config.load_collection_phase),
    )
