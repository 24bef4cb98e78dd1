"""Runs of the tagged model under a balancer: what one rank does, as module-level functions for `RankPool`."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch.distributed import Store

from eplb_backends.cpu import CpuBackend
from eplb_platform import EplbConfig, ExpertMap, Topology
from eplb_platform.balance import balancedness
from eplb_platform.heat import Phase
from eplb_platform.migration.schedule import Chunk
from eplb_platform.runtime import Balancer, Stage, start_balancer
from tests.processes.common_end import CommonEnd
from tests.processes.tagged_model import NUM_REDUNDANT, STEPS_PER_TOPIC, TaggedModel

DYNAMIC: dict[str, object] = {
    "dynamic_eplb": True,
    "expert_heat_collection_interval": 12,
    "algorithm_execution_interval": 0,
    "load_windows": 4,
    "transfer_timeout_s": 60.0,
}
RECORDERS_OWN = frozenset({"trace_steps", "records_written", "failed_records"})
"""Numbers that only the rank has that records, which is rank 0."""


@dataclass(frozen=True)
class Run:
    """What is asked of one run, the same on every rank."""

    steps: int
    """At least; see `until`."""
    until: Mapping[str, int] = field(default_factory=dict)
    """Serve on until the statistics of every rank have at least these numbers: how many cycles there are in
    so many passes is up to the machine.
    """
    steps_after: int = 0
    """So many passes more."""
    steps_per_topic: int = STEPS_PER_TOPIC
    config: dict[str, object] = field(default_factory=lambda: dict(DYNAMIC))
    fault_stage: str = ""
    fault_ranks: tuple[int, ...] = ()
    step_s: float = 0.0
    """Least time that a forward pass takes."""
    stop_in_stage: str = ""
    """End, on all ranks at one step, soon after rank 0's cycle has entered this stage."""
    deploy: tuple[NDArray[np.int32] | None, ...] = ()
    """What each rank deploys at start: [layers, physical], or None."""
    num_redundant_experts: int = NUM_REDUNDANT
    dummy_steps: tuple[int, ...] = ()
    """Steps that are dummy passes on every rank."""
    rank_1_dummy_steps: tuple[int, ...] = ()
    action: str = ""
    """Name of an `ACTIONS` entry, called before every step."""

    def on(self, **config: object) -> Run:
        """This run with other configuration keys."""
        return replace(self, config={**self.config, **config})

    def map_to_deploy(self, rank: int, initial: ExpertMap) -> ExpertMap | None:
        slots = self.deploy[rank] if self.deploy else None
        return (
            None
            if slots is None
            else ExpertMap(slots, initial.num_logical_experts, Topology(initial.topology.num_ranks))
        )


@dataclass(frozen=True)
class RunResult:
    """What one rank saw."""

    wrong_tokens: int
    misplaced_experts: int
    is_weighted: bool
    first_wrong_step: int | None
    stats: dict[str, int | float | str | None]
    state_before_close: str
    state_after_close: str
    threads_left: list[str]
    physical_to_logical: NDArray[np.int32]
    balancedness: NDArray[np.float64]
    """[steps], mean over layers, of this rank's own tokens."""
    model_collectives: int
    steps_served: int
    group_calls_on_forward_thread: int
    stages: tuple[str, ...]


class WatchedBackend(CpuBackend):
    """Counts calls of the group that come from the thread that serves."""

    on_forward_thread = 0
    GROUP_METHODS: ClassVar = ("sum_on_host", "broadcast_on_host", "exchange", "rebuild")

    def watch(self) -> None:
        """From now on this thread is the forward thread."""
        forward = threading.get_ident()
        for name in self.GROUP_METHODS:
            setattr(self, name, self._counted(getattr(self, name), forward))

    def _counted(self, method: Callable[..., object], forward: int) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.on_forward_thread += threading.get_ident() == forward
            return method(*arguments)

        return call


class StageObserver:
    """Notes the stages of a rank's cycles; raises once in the given stage on the given ranks."""

    def __init__(self, run: Run, rank: int) -> None:
        self._armed = rank in run.fault_ranks
        self._stage = run.fault_stage
        self.seen: list[str] = []

    def __call__(self, stage: Stage) -> None:
        self.seen.append(str(stage))
        if self._armed and stage == self._stage:
            self._armed = False
            raise RuntimeError(f"injected in {stage}")


def pause_early_and_resume(balancer: Balancer, step: int) -> None:
    if step == 0:
        balancer.pause()
    if step == 100:
        assert balancer.stats.commits == 0
        assert balancer.state == "paused"
        balancer.resume()


def pause_and_resume_often(balancer: Balancer, step: int) -> None:
    """Ends cycles at all their stages, also between the agreement on a commit and the commit itself."""
    if step % 7 == 3:
        balancer.pause()
    if step % 7 == 5:
        balancer.resume()


def ask_for_a_cycle(balancer: Balancer, step: int) -> None:
    if step == 5:
        balancer.rebalance_now()


def change_maps_only(balancer: Balancer, step: int) -> None:
    """Break the rule on purpose: route by a new map, leave the weights where they are."""
    if step == 10:
        old = balancer.expert_map
        turned = np.roll(old.physical_to_logical, 1, axis=1)
        new = ExpertMap(turned, old.num_logical_experts, old.topology)
        balancer._model.apply_map(range(old.num_layers), new)


def commit_late_on_rank_1(balancer: Balancer, step: int) -> None:
    """Break the rule on purpose: one rank commits one step after the others."""
    if step == 0 and balancer._link.rank == 1:
        gate = balancer._link.gate
        on_time = gate.act_at
        gate.act_at = lambda boundary, commit: on_time(boundary + 1, commit)  # type: ignore[method-assign]


def die_late(balancer: Balancer, step: int) -> None:
    """As `kill -9` does, on the rank that records."""
    if balancer._link.rank == 0 and step > 50 and balancer.stats.trace_steps:
        os._exit(9)


def break_the_group(balancer: Balancer, step: int) -> None:
    """Let the first transfer of rank 2 fail."""
    if step == 0 and balancer._link.rank == 2:
        group = balancer._link.group
        fetch = group.fetch

        async def fail_once(chunk: Chunk) -> None:
            group.fetch = fetch  # type: ignore[method-assign]
            raise RuntimeError("the transfer broke")

        group.fetch = fail_once  # type: ignore[method-assign]


ACTIONS: dict[str, Callable[[Balancer, int], None]] = {
    action.__name__: action
    for action in (
        pause_early_and_resume,
        pause_and_resume_often,
        ask_for_a_cycle,
        change_maps_only,
        commit_late_on_rank_1,
        break_the_group,
        die_late,
    )
}


def serve(rank: int, num_ranks: int, store: Store, run: Run) -> RunResult:
    """Serve `run.steps` forward passes under a balancer and close it."""
    backend = WatchedBackend()
    model = TaggedModel(
        backend, store, rank, num_ranks, run.num_redundant_experts, steps_per_topic=run.steps_per_topic
    )
    observer = StageObserver(run, rank)
    config = EplbConfig.from_additional_config({"eplb_config": run.config}, environ={})
    deploy = run.map_to_deploy(rank, model.expert_map)
    balancer = start_balancer(
        config, model, backend, store, rank, deploy=deploy, model_name="tagged", on_stage=observer
    )
    backend.watch()
    wrong: list[int] = []
    balanced: list[float] = []
    action = ACTIONS.get(run.action)
    end = CommonEnd(store, rank, range(num_ranks), steps_after=run.steps_after)
    for step in itertools.count():
        if run.until or run.stop_in_stage:
            if end.has_come(step, is_enough(run, rank, step, balancer, observer.seen)):
                break
        elif step == run.steps:
            break
        if action is not None:
            action(balancer, step)
        time.sleep(run.step_s)
        failed, load = model.forward(step)
        wrong.append(failed)
        balanced.append(_own_balancedness(load, num_ranks))
        is_dummy = step in run.dummy_steps or (rank == 1 and step in run.rank_1_dummy_steps)
        balancer.step(load, phase=phase_of(step), is_dummy=is_dummy)
    state = balancer.state
    balancer.close()
    balancer.close()
    first_wrong = next((step for step, failed in enumerate(wrong) if failed), None)
    return RunResult(
        sum(wrong),
        model.misplaced_experts(balancer.expert_map),
        model.repeats_entries,
        first_wrong,
        balancer.stats.as_dict(),
        state,
        balancer.state,
        [thread.name for thread in threading.enumerate() if thread.name.startswith("eplb")],
        balancer.expert_map.physical_to_logical,
        np.array(balanced),
        model.collectives,
        len(wrong),
        backend.on_forward_thread,
        tuple(observer.seen),
    )


def phase_of(step: int) -> Phase:
    """What kind of pass every rank makes at a step."""
    return Phase(step % len(Phase))


def is_enough(run: Run, rank: int, step: int, balancer: Balancer, stages: Sequence[str]) -> bool:
    """Whether a rank has seen in this run what it is to be served for."""
    if run.stop_in_stage:
        return rank != 0 or run.stop_in_stage in stages
    stats = balancer.stats.as_dict()
    return step + 2 >= run.steps and all(
        int(stats[name] or 0) >= number
        for name, number in run.until.items()
        if rank == 0 or name not in RECORDERS_OWN
    )


def _own_balancedness(load: NDArray[np.int64], num_ranks: int) -> float:
    by_rank = load.reshape(len(load), num_ranks, -1).sum(axis=-1)
    return float(balancedness(by_rank).mean())
