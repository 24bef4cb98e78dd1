"""Putting a balancer together for real processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, cast

from eplb_platform.algorithms import load_algorithm
from eplb_platform.algorithms.compute_aware import ComputeAware
from eplb_platform.algorithms.random_placement import RandomPlacement
from eplb_platform.algorithms.survival import check_survival
from eplb_platform.config import EplbConfig
from eplb_platform.cost import ExpertComputeProfiler
from eplb_platform.dispatch import warm_up as warm_up_dispatch
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import MIN_SKEW_STEPS, HeatWindows, LoadCollection
from eplb_platform.heat import warm_up as warm_up_heat
from eplb_platform.migration.schedule import warm_up as warm_up_schedule
from eplb_platform.migration.staging import BYTES_PER_MB, Staging
from eplb_platform.migration.transfer import Migrator
from eplb_platform.runtime.agreement import Agreement
from eplb_platform.runtime.balancer import Balancer
from eplb_platform.runtime.bounded_planner import BoundedPlanner
from eplb_platform.runtime.compute_profiling import ComputeProfiling
from eplb_platform.runtime.cycle import CycleRules, RankLink, Stage
from eplb_platform.runtime.deployment import Deployment
from eplb_platform.runtime.gate import ForwardGate
from eplb_platform.runtime.locked_heat import LockedHeat
from eplb_platform.runtime.meeting import ForwardMeetings
from eplb_platform.runtime.moved_together import check_moved_together
from eplb_platform.runtime.planning import AlgorithmPlanner, LoadHistory
from eplb_platform.runtime.ports import Background, CostRecorder, Planner, Recorder, Tracer, run_blocking
from eplb_platform.runtime.production import BackendGroup, BackgroundThread, ThreadClock
from eplb_platform.runtime.recording import ComputeCostRecorder, MapRecorder, TraceRecorder
from eplb_platform.runtime.served_model import MeasuredModel, ServedModel, WeightedModel
from eplb_platform.runtime.step_loads import StepLoads
from eplb_platform.runtime.store_plane import StoreControlPlane
from eplb_platform.runtime.watchdog import Watchdog
from eplb_platform.runtime.weighting import RoutingTables

if TYPE_CHECKING:
    from torch.distributed import Store

    from eplb_platform.backend import Backend

logger = logging.getLogger(__name__)

PLANNER_TIMEOUTS = 1.5
"""A planner that is given to `start_balancer` has so many transfer time-outs; a meeting waits for two."""
TRACE_INTERVALS = 4
"""Collections whose passes are kept for the trace while no cycle can add them up."""


def start_balancer(
    config: EplbConfig,
    model: ServedModel,
    backend: Backend,
    store: Store,
    rank: int,
    *,
    num_expert_groups: int = 1,
    name: str = "eplb",
    model_name: str | None = None,
    deploy: ExpertMap | None = None,
    joins: bool = False,
    planner: Planner | None = None,
    recorder: Recorder | None = None,
    tracer: Tracer | None = None,
    on_stage: Callable[[Stage], None] | None = None,
) -> Balancer:
    """Start balancing `model` on this rank; every active rank calls it, and it returns when all have.

    Active are the ranks that `model.expert_map` names so. Another rank, and any process that `joins`, may
    call it at any time: it meets nobody, is not active, and joins with `Balancer.resize`. Of its map only the
    shape and the numbers of experts, ranks and nodes count.

    store: shared by all ranks; the balancer and its backend take clients of their own.
    name: keeps the keys of several models in one store apart.
    model_name: for the log; `name` by default.
    deploy: a map, the same on every rank, that the weights are moved to before this returns; balancing
        starts from there. The number of nodes is that of `model.expert_map`, whatever a file says.
    joins: a new process in a group that serves already. Its map may name this rank active: without redundancy
        there is no other.
    planner: plans in place of the configured algorithm, in a thread of its own; left behind when it does not
        answer within one and a half `transfer_timeout_s`, and asked nothing else until it does.
    recorder: records in place of a `MapRecorder` for `expert_map_record_path`; used on the
        first active rank only.
    tracer: keeps the load of every step in place of a `TraceRecorder`, where `trace_record_path` is set; used
        on the first active rank only.
    on_stage: called in the background thread whenever a cycle enters a stage.
    Raises ValueError for an unknown algorithm, for too little staging memory, for expert weights that leave
    out what has to move with them (`NamedModel`), and where there is no other rank to join; `GroupError` when
    not every rank comes, and `DeploymentError` when ranks start from different maps or configurations, or
    `deploy` cannot be reached; the model must not serve then.
    """
    from torch.distributed import PrefixStore

    members = _members(model, rank, joins)
    if rank == members[0]:
        _warn_of_keys_without_effect(config)
    load_algorithm(config.algorithm)  # on every rank, so that an unknown name stops them all
    if config.moves_experts or deploy is not None:
        check_moved_together(model, backend, refuse=config.check_expert_tensors)
    num_ranks = model.expert_map.topology.num_ranks
    initial = model.expert_map
    check_survival(
        config.survive, initial.num_logical_experts, initial.num_physical_experts, initial.topology
    )
    with ExitStack() as undo:
        undo.callback(backend.close)
        closing = ExitStack()
        closing.callback(backend.close)
        _connect(backend, PrefixStore(name, store), rank, num_ranks, members, config.transfer_timeout_s)
        migrator = _new_migrator(config, model, backend, rank) if config.moves_experts else None
        gate = ForwardGate()
        group = BackendGroup(backend, migrator, config.transfer_timeout_s, members if rank in members else ())
        link = RankLink(
            rank,
            num_ranks,
            plane=StoreControlPlane(PrefixStore(name, _client_of(store))),
            group=group,
            clock=ThreadClock(gate.changed),
            gate=gate,
            members=members,
        )
        expert_map = model.expert_map
        if rank in members:
            expert_map = _deploy(config, model, backend, link, migrator, deploy)
        balancer = assemble(
            config,
            model,
            link,
            ForwardMeetings(StoreControlPlane(PrefixStore(name, _client_of(store))), link),
            model_name=model_name or name,
            expert_map=expert_map,
            migrator=migrator,
            planner=_bounded(planner, link, config, name)
            if planner is not None
            else _planner(config, num_expert_groups, link.plans),
            recorder=recorder or _map_recorder(config),
            tracer=tracer or _trace_recorder(config, model, link.plans, model_name),
            background=BackgroundThread(f"{name}-cycle"),
            lend_migrator=lambda: group.lent(_new_migrator(config, model, backend, rank)),
            on_stage=on_stage,
            on_close=closing.close,
            profiling=_profiling(config, model, backend, rank),
            cost_recorder=_cost_recorder(config),
        )
        watchdog = Watchdog(balancer, rank, config.transfer_timeout_s, f"{name}-watchdog")
        closing.callback(watchdog.start())
        undo.pop_all()
    balancer.record_start()
    return balancer


def assemble(
    config: EplbConfig,
    model: ServedModel,
    link: RankLink,
    meetings: ForwardMeetings,
    *,
    model_name: str,
    expert_map: ExpertMap,
    migrator: Migrator | None,
    planner: Planner,
    recorder: Recorder | None,
    tracer: Tracer | None,
    background: Background,
    lend_migrator: Callable[[], AbstractContextManager[Migrator]] | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_close: Callable[[], None] | None = None,
    profiling: ComputeProfiling | None = None,
    cost_recorder: CostRecorder | None = None,
) -> Balancer:
    """A balancer over the given ports, with what the configuration says of all else; a simulation calls this.

    expert_map: what the weights follow; migrator: None where the configuration moves nothing
    """
    balancer = Balancer(
        config,
        model,
        link,
        meetings,
        _rules(config, migrator),
        model_name=model_name,
        expert_map=expert_map,
        tables=_even_tables(config, model, expert_map),
        heat=LockedHeat(_heat_windows(config, model)),
        migrator=migrator,
        planner=planner,
        recorder=recorder,
        step_loads=_step_loads(config, model),
        tracer=tracer,
        background=background,
        lend_migrator=lend_migrator,
        on_stage=on_stage,
        on_close=on_close,
        profiling=profiling,
        cost_recorder=cost_recorder,
    )
    if profiling is not None:
        profiling.begin_pass(expert_map)
    if migrator is not None:
        balancer.stats.staging_bytes = migrator.staging.nbytes
    return balancer


def _members(model: ServedModel, rank: int, joins: bool) -> Sequence[int]:
    """The ranks that serve once `start_balancer` has returned, ascending."""
    active = model.expert_map.topology.active_ranks
    if not joins:
        return active
    others = tuple(one for one in active if one != rank)
    if not others:
        raise ValueError(f"rank {rank} is to join, but its map names no other active rank")
    return others


def _connect(
    backend: Backend, store: Store, rank: int, num_ranks: int, members: Sequence[int], timeout_s: float
) -> None:
    """The group of the active ranks; a rank that is none of them meets nobody yet."""
    if len(members) == num_ranks:
        backend.connect(store, rank, num_ranks, timeout_s)
    else:
        backend.attach(store, rank, num_ranks, timeout_s)
        if rank not in members:
            return
        backend.regroup(0, members)
    backend.warm_up()


def _deploy(
    config: EplbConfig,
    model: ServedModel,
    backend: Backend,
    link: RankLink,
    migrator: Migrator | None,
    target: ExpertMap | None,
) -> ExpertMap:
    """Bring the weights to `target`; staging that nothing needs afterwards is freed."""
    places = Agreement(link.plane, link.clock, scope="start", rank=link.rank, ranks=link.members)
    deployment = Deployment(
        model,
        config,
        places,
        link.rank,
        layers_per_chunk=config.layer_updates_per_step,
        timeout_s=config.transfer_timeout_s,
        make_migrator=lambda: migrator or _new_migrator(config, model, backend, link.rank),
        make_group=lambda migrator: BackendGroup(backend, migrator, config.transfer_timeout_s, link.members),
    )
    expert_map = run_blocking(deployment.run(model.expert_map, target))
    link.finished_keys = places.keys
    return expert_map


def _client_of(store: Store) -> Store:
    """A client of the same store, so that no call waits for another thread's."""
    clone: Callable[[], Store] = store.clone  # type: ignore[attr-defined]  # missing from torch's stubs
    return clone()


def _warn_of_keys_without_effect(config: EplbConfig) -> None:
    """Of compute cost: measured, it counts with every algorithm; not measured, with none."""
    if config.enable_expert_compute_profiling:
        if config.compute_cost_alpha == 0:
            logger.info("eplb_config.compute_cost_alpha is 0: compute time is measured, tokens alone count")
        elif config.compute_cost_alpha < 1:
            logger.info(
                "eplb_config.compute_cost_alpha is %g: plans stand between level tokens and level time; "
                "1 levels time alone",
                config.compute_cost_alpha,
            )
        if config.algorithm == RandomPlacement.name:
            logger.warning("algorithm %r places without looking at load or compute time", config.algorithm)
    elif config.compute_cost_record_path is not None:
        logger.warning(
            "eplb_config.compute_cost_record_path without enable_expert_compute_profiling: "
            "nothing is measured"
        )
    elif issubclass(load_algorithm(config.algorithm), ComputeAware):
        logger.warning(
            "algorithm %r without eplb_config.enable_expert_compute_profiling: nothing is measured, "
            "it plans by tokens alone",
            config.algorithm,
        )


def _profiling(
    config: EplbConfig, model: ServedModel, backend: Backend, rank: int
) -> ComputeProfiling | None:
    """On every rank where it is configured, even if the model has no timers: ranks add up their profiles."""
    if not (config.enable_expert_compute_profiling and config.observes):
        return None
    profiler = ExpertComputeProfiler(
        model.expert_map.num_layers,
        model.expert_map.num_logical_experts,
        warmup_steps=config.expert_compute_profiling_warmup_steps,
        profiling_interval=config.expert_compute_profiling_interval,
    )
    profiling = ComputeProfiling(profiler, rank, config.compute_cost_alpha)
    if hasattr(model, "measure_with"):
        cast(MeasuredModel, model).measure_with(profiling, backend)
    else:
        logger.warning("%s times no experts: it is balanced by tokens", type(model).__name__)
    return profiling


def _cost_recorder(config: EplbConfig) -> ComputeCostRecorder | None:
    path = config.compute_cost_record_path
    return None if path is None else ComputeCostRecorder(Path(path))


def _new_migrator(config: EplbConfig, model: ServedModel, backend: Backend, rank: int) -> Migrator:
    """Where experts move while serving, its staging is allocated once and here, before the engine measures
    its free memory.
    """
    max_bytes = None if config.staging_memory_mb is None else int(config.staging_memory_mb * BYTES_PER_MB)
    staging = Staging(
        backend, model.expert_weights, max_bytes=max_bytes, layers_per_chunk=config.layer_updates_per_step
    )
    warm_up_schedule()
    return Migrator(backend, model.expert_weights, staging, rank, verify=config.verify_transfers)


def _rules(config: EplbConfig, migrator: Migrator | None) -> CycleRules:
    return CycleRules(
        moves_experts=config.moves_experts,
        plans=config.moves_experts or config.records_map,
        layers_per_chunk=config.layer_updates_per_step,
        staging_slots=0 if migrator is None else migrator.staging.slots,
        commit_margin_steps=config.commit_margin_steps,
        timeout_s=config.transfer_timeout_s,
        first_commit_after_steps=config.algorithm_execution_interval,
    )


def _planner(config: EplbConfig, num_expert_groups: int, plans: bool) -> AlgorithmPlanner:
    """The configured algorithm, ready to plan on the rank that does."""
    planner = AlgorithmPlanner(
        algorithm=config.algorithm,
        num_expert_groups=num_expert_groups,
        timeout_s=config.transfer_timeout_s,
        min_balancedness=config.min_balancedness,
        max_moved_experts_per_layer=config.max_moved_experts_per_layer,
        survive=config.survive,
        history=None if config.moves_experts else LoadHistory(),
    )
    if config.observes and plans:
        planner.warm_up()
    return planner


def _bounded(planner: Planner, link: RankLink, config: EplbConfig, name: str) -> BoundedPlanner:
    """Half as long again as the watchdog waits: it says first where the rank is."""

    def run(question: Coroutine[None, None, None]) -> None:
        Thread(target=run_blocking, args=(question,), name=f"{name}-planner", daemon=True).start()

    timeout_s = PLANNER_TIMEOUTS * config.transfer_timeout_s
    return BoundedPlanner(planner, link.clock, link.gate, timeout_s=timeout_s, run=run)


def _map_recorder(config: EplbConfig) -> MapRecorder | None:
    path = config.expert_map_record_path
    return None if path is None else MapRecorder(Path(path))


def _even_tables(config: EplbConfig, model: ServedModel, expert_map: ExpertMap) -> RoutingTables | None:
    """What a model routes by whose replicas may get unequal shares later; None where they never do."""
    asked = config.weighted_dispatch or getattr(load_algorithm(config.algorithm), "weighted_dispatch", False)
    if not (config.moves_experts and asked):
        return None
    if not hasattr(model, "apply_tables"):
        logger.warning("%s takes no weighted tables: replicas share evenly", type(model).__name__)
        return None
    warm_up_dispatch()
    return RoutingTables.even(expert_map, cast(WeightedModel, model).routing_table_width)


def _step_loads(config: EplbConfig, model: ServedModel) -> StepLoads | None:
    if config.trace_record_path is None:
        return None
    return StepLoads(
        model.expert_map.num_layers,
        model.expert_map.num_logical_experts,
        steps=config.trace_range,
        capacity=TRACE_INTERVALS * config.expert_heat_collection_interval + MIN_SKEW_STEPS,
    )


def _trace_recorder(
    config: EplbConfig, model: ServedModel, plans: bool, model_name: str | None
) -> TraceRecorder | None:
    """What the model says of itself goes into the trace: `num_experts_per_token`, `first_moe_layer`."""
    if config.trace_record_path is None or not plans:
        return None
    said = {
        "model": model_name or getattr(model, "model_name", None),
        "num_experts_per_token": getattr(model, "num_experts_per_token", None),
        "first_moe_layer": getattr(model, "first_moe_layer", None),
    }
    return TraceRecorder(
        Path(config.trace_record_path),
        model.expert_map.num_layers,
        model.expert_map.num_logical_experts,
        {key: str(value) for key, value in said.items() if value is not None},
    )


def _heat_windows(config: EplbConfig, model: ServedModel) -> HeatWindows:
    warm_up_heat()
    return HeatWindows(
        model.expert_map.num_layers,
        model.expert_map.num_logical_experts,
        steps=config.expert_heat_collection_interval,
        num_windows=config.num_load_windows,
        collection=LoadCollection(config.load_collection_phase),
    )
