"""A served model whose weights are loaded anew in the middle of a cycle: what one rank does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch.distributed import Store

from eplb_backends.cpu import CpuBackend
from eplb_platform import EplbConfig, ExpertMap
from eplb_platform.runtime import Balancer, MeetingFailed, Stage, start_balancer
from tests.processes.serve_tagged import DYNAMIC
from tests.processes.tagged_model import TaggedModel

STEPS_AFTERWARDS = 40
MOST_STEPS = 4000
HOLD_S = 60.0
ABSENCE_S = 2.0
"""How long ranks wait for one that does not come."""
MEETING_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Reload:
    """When the weights are loaded anew, and what goes wrong then."""

    stage: str = ""
    """In which stage of a cycle; empty: between two cycles."""
    held_ranks: tuple[int, ...] = ()
    """Ranks whose cycle stays in that stage until the forward threads have begun to meet."""
    is_promised: bool = False
    """Let rank 2 offer its boundary only then: others have promised theirs and wait for its."""
    before: bool = True
    """Whether the balancer is told before the weights are written, or after."""
    absent_rank: int | None = None
    """Comes too late to the meeting; then no rank loads its weights."""
    ahead_rank: int | None = None
    """Counts the last pass before the meeting, the others count it after."""
    at_commit: bool = False
    """Meet at the pass whose end is the agreed boundary of a commit."""
    action: str = "invalidate"
    config: dict[str, object] = field(default_factory=lambda: {**DYNAMIC, "commit_margin_steps": 30})


@dataclass(frozen=True)
class ReloadResult:
    """What one rank saw."""

    wrong_tokens: int
    misplaced_experts: int
    was_pending: bool
    """Whether a commit was agreed and not executed when the meeting began."""
    was_promised: bool
    """Whether a boundary was promised and not answered then."""
    error: str
    late_error: str
    state_after: str
    commits_before: int
    stats: dict[str, int | float | str | None]
    physical_to_logical: NDArray[np.int32]
    map_after: NDArray[np.int32]
    map_before: NDArray[np.int32]


class StageHolder:
    """Keeps a rank's cycle in a stage until it is let go."""

    def __init__(self, reload: Reload, rank: int) -> None:
        self._stage = reload.stage
        self._holds = rank in reload.held_ranks
        self.reached = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, stage: Stage) -> None:
        if stage == self._stage and not self.reached.is_set():
            self.reached.set()
            if self._holds:
                self.let_go.wait(HOLD_S)


def serve_reloaded(rank: int, num_ranks: int, store: Store, reload: Reload) -> ReloadResult:
    """Serve until rank 0's cycle is in the stage, load the weights in their first places, serve on."""
    backend = CpuBackend()
    model = TaggedModel(backend, store, rank, num_ranks)
    initial = model.expert_map
    config = EplbConfig.from_additional_config({"eplb_config": reload.config}, environ={})
    holder = StageHolder(reload, rank)
    balancer = start_balancer(config, model, backend, store, rank, on_stage=holder)
    if reload.is_promised and rank == 2:
        _offer_late(balancer, holder)
    gate = balancer._link.gate
    step = wrong = 0

    def when() -> int | None:
        """The step to meet at, once rank 0 knows one."""
        if reload.at_commit:
            return None if gate._action_at is None else gate._action_at - 1
        if reload.is_promised:
            return None if gate._promise is None else step + 2
        is_ready = holder.reached.is_set() if reload.stage else balancer.stats.cycles > 0
        return step + 2 if is_ready else None

    while not _is_time(store, "meet", step, rank, when):
        failed, load = model.forward(step)
        wrong += failed
        balancer.step(load)
        step += 1
        if reload.stage == "commit":
            wait_until(lambda: gate._promise is None)  # the verdict is to come well before its boundary
    failed, load = model.forward(step)
    wrong += failed
    if reload.stage == "commit":
        wait_until(gate.agreed_action)  # the verdict may reach the ranks at different times
    if rank == reload.ahead_rank or reload.ahead_rank is None:
        balancer.step(load)
    was_pending, was_promised = gate.agreed_action() is not None, gate._promise is not None
    map_before, commits_before = balancer.expert_map, balancer.stats.commits
    threading.Timer(0.1, holder.let_go.set).start()
    error = late_error = ""
    if rank != reload.absent_rank:
        error = _act(balancer, model, initial, reload)
    map_after, state_after = balancer.expert_map, balancer.state
    if rank not in (reload.ahead_rank, None) and reload.ahead_rank is not None:
        balancer.step(load)
    step += 1
    end = step + STEPS_AFTERWARDS

    def when_enough() -> int | None:
        """Rank 0 has seen a later cycle move something, so all ranks have."""
        return step + 2 if step > end and balancer.stats.commits > commits_before + 1 else None

    while step < end + MOST_STEPS and not _is_time(store, "end", step, rank, when_enough):
        failed, load = model.forward(step)
        wrong += failed
        balancer.step(load)
        step += 1
    if rank == reload.absent_rank:
        late_error = _act(balancer, model, initial, reload)
    balancer.close()
    return ReloadResult(
        wrong,
        model.misplaced_experts(balancer.expert_map),
        was_pending,
        was_promised,
        error,
        late_error,
        state_after,
        commits_before,
        balancer.stats.as_dict(),
        balancer.expert_map.physical_to_logical,
        map_after.physical_to_logical,
        map_before.physical_to_logical,
    )


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HOLD_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


def _act(balancer: Balancer, model: TaggedModel, initial: ExpertMap, reload: Reload) -> str:
    timeout_s = MEETING_TIMEOUT_S if reload.absent_rank is None else ABSENCE_S
    try:
        if reload.action == "drain":
            balancer.drain(timeout_s=timeout_s)
        elif reload.before:
            balancer.invalidate(initial, timeout_s=timeout_s)
            model.reload_weights(initial)
        else:
            model.reload_weights(initial)
            if reload.action == "forget":
                return ""
            balancer.invalidate(initial, timeout_s=timeout_s)
    except MeetingFailed as failed:
        return str(failed)
    return ""


def _offer_late(balancer: Balancer, holder: StageHolder) -> None:
    gate = balancer._link.gate
    promise = gate.promise

    def late(margin: int, not_before: int) -> int:
        holder.let_go.wait(HOLD_S)
        return promise(margin, not_before)

    gate.promise = late  # type: ignore[method-assign]


def _is_time(store: Store, key: str, step: int, rank: int, when: Callable[[], int | None]) -> bool:
    """Ranks are at most one step apart, so a step that rank 0 names two ahead is one for all."""
    if rank == 0 and not store.check([key]) and (chosen := when()) is not None:
        store.set(key, str(chosen))
    return store.check([key]) and step >= int(store.get(key))
