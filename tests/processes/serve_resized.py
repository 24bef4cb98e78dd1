"""Runs of the tagged model in which ranks leave and join: what one rank does, for `RankPool`."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import Store

from eplb_backends.cpu import CpuBackend
from eplb_platform import EplbConfig
from eplb_platform.backend import Backend, Message
from eplb_platform.runtime import Balancer, LostExpertsError, ResizeError, start_balancer
from eplb_platform.runtime.agreement import Agreement
from tests.processes.common_end import CommonEnd
from tests.processes.serve_by_forward import ObservedBackend, await_forward_stream
from tests.processes.serve_tagged import DYNAMIC
from tests.processes.tagged_model import NUM_EXPERTS, NUM_REDUNDANT, TaggedModel, tag


@dataclass(frozen=True)
class Segment:
    """A resize, and the passes after it. The first one of a run is the start: no resize."""

    active: tuple[int, ...]
    dead: tuple[int, ...] | None = ()
    absent: tuple[int, ...] = ()
    """Ranks that do not call `resize`, as if they were dead."""
    fresh: tuple[int, ...] = ()
    """Ranks that come as a process that was just started, without weights."""
    steps: int = 60
    """At least; see `until`."""
    until: str = ""
    """Serve on until every serving rank has counted one more of these statistics: cycles, commits."""
    can_load: bool = False
    timeout_s: float | None = None
    fails_on: int | None = None
    """This rank's first transfer of the resize fails."""
    killed: int | None = None
    """This rank is killed at `killed_at`, so it is absent from then on."""
    killed_at: str = ""
    """`before PLACE` or `after PLACE`: of its part in that agreement of the resize; or `in the transfer`."""


@dataclass
class ResizeResult:
    """What one rank saw, an item for each segment."""

    wrong_tokens: int = 0
    served: int = 0
    errors: list[str] = field(default_factory=list)
    lost: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    maps: list[NDArray[np.int32]] = field(default_factory=list)
    active: list[bool] = field(default_factory=list)
    misplaced: list[int] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    cycles: list[int] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    last_error: str = ""


class Server:
    """One rank through all its lives."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        store: Store,
        redundant: int,
        config: dict[str, object],
        by_forward: bool,
    ) -> None:
        """by_forward: exchanges are enqueued by the forward thread, on a simulated device."""
        self.rank, self.num_ranks, self.store = rank, num_ranks, store
        self.redundant = redundant
        self.config = EplbConfig.from_additional_config({"eplb_config": config}, environ={})
        self.step = 0
        self.by_forward = by_forward

    def start(self, active: Sequence[int], *, is_fresh: bool = False, joins: bool = False) -> None:
        self.backend: Backend = ObservedBackend(self.rank) if self.by_forward else CpuBackend()
        slots = (NUM_EXPERTS + self.redundant) // self.num_ranks
        redundant = slots * len(active) - NUM_EXPERTS
        self.model = TaggedModel(
            self.backend,
            self.store,
            self.rank,
            self.num_ranks,
            redundant,
            active_ranks=active,
            joins=joins,
        )
        if is_fresh or joins:
            self.model.forget_weights()
        self.balancer: Balancer = start_balancer(
            self.config,
            self.model,
            self.backend,
            self.store,
            self.rank,
            joins=joins,
            model_name="tagged",
        )

    def resize(self, segment: Segment, number: int) -> None:
        if segment.fails_on == self.rank:
            self.backend.exchange = self._fail_once  # type: ignore[method-assign]
        if segment.killed == self.rank:
            self._die(segment.killed_at)
        load = self._load if segment.can_load else None
        self.balancer.resize(segment.active, dead=segment.dead, load_expert=load, timeout_s=segment.timeout_s)
        if self.balancer.is_active:
            self.model.use_ranks(segment.active, f"/{number}")

    def serve(self, segment: Segment, ranks: Sequence[int], number: int, result: ResizeResult) -> None:
        end = CommonEnd(self.store, self.rank, ranks, name=str(number))
        before = self._counted(segment.until)
        for passes in itertools.count():
            if segment.until:
                has_seen = self._counted(segment.until) > before
                if end.has_come(passes, has_seen and passes + 2 >= segment.steps):
                    break
            elif passes == segment.steps:
                break
            self.settle()
            wrong, load = self.model.forward(self.step)
            result.wrong_tokens += wrong
            result.served += 1
            self.balancer.step(load)
            self.step += 1

    def _counted(self, name: str) -> int:
        return int(getattr(self.balancer.stats, name)) if name else 0

    def settle(self) -> None:
        """A pass reads its weights on the host, once the device has done what was enqueued."""
        if isinstance(self.backend, ObservedBackend):
            await_forward_stream(self.backend)

    def _load(self, layer: int, expert: int) -> list[torch.Tensor]:
        said = tag(layer, torch.tensor([expert]))
        return [said.float().repeat(8), said]

    def _die(self, at: str) -> None:
        """Have this process killed where the resize comes to it."""

        def kill(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if at == "in the transfer":
            self.backend.exchange = kill  # type: ignore[method-assign]
            return
        when, place = at.split()
        decide = Agreement.decide

        async def decide_and_die(self: Agreement, name: str, *args: Any, **options: Any) -> int:
            if name == place and when == "before":
                kill()
            decided = await decide(self, name, *args, **options)
            if name == place:
                kill()
            return decided

        Agreement.decide = decide_and_die  # type: ignore[method-assign]

    def _fail_once(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return type(self.backend).exchange(self.backend, sends, receives)  # of the cycle that ends
        del self.backend.exchange  # type: ignore[method-assign]
        raise RuntimeError("the transfer broke")


def serve_resized(
    rank: int,
    num_ranks: int,
    store: Store,
    segments: Sequence[Segment],
    redundant: int = NUM_REDUNDANT,
    config: dict[str, object] | None = None,
    by_forward: bool = False,
) -> ResizeResult:
    """Serve all segments; a rank that is not active in one waits for the next."""
    result = ResizeResult()
    server = Server(rank, num_ranks, store, redundant, config or DYNAMIC, by_forward)
    server.start(segments[0].active, is_fresh=rank not in segments[0].active)
    active = segments[0].active
    for number, segment in enumerate(segments):
        error, lost = "", ()
        started = time.monotonic()
        if number and rank in segment.fresh:
            server.balancer.close()
            server.start(range(num_ranks), joins=True)
        if number and rank not in segment.absent and (rank in active or rank in segment.active):
            server.step = max(int(store.get(f"step/{number - 1}")), server.step)
            try:
                server.resize(segment, number)
            except ResizeError as failed:
                error = str(failed)
                lost = failed.experts if isinstance(failed, LostExpertsError) else ()
        result.pauses_s.append(time.monotonic() - started)
        result.errors.append(error)
        result.lost.append(lost)
        if not error:
            active = segment.active
        balancer = server.balancer
        if balancer.is_active and rank in active and not (set(active) & set(segment.absent)):
            server.serve(segment, active, number, result)
        store.set(f"step/{number}", str(server.step)) if rank == active[0] else None
        result.maps.append(balancer.expert_map.physical_to_logical)
        result.active.append(balancer.is_active)
        server.settle()
        result.misplaced.append(server.model.misplaced_experts(balancer.expert_map))
        result.commits.append(balancer.stats.commits)
        result.cycles.append(balancer.stats.cycles)
        result.last_error = balancer.stats.last_error
    server.balancer.close()
    return result
