"""Runs of the tagged model on a simulated device whose exchanges the forward thread enqueues."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch.distributed import Store

from eplb_backends.accelerator.collective_transfer import DeviceGroup
from eplb_platform import EplbConfig
from eplb_platform.backend import Message
from eplb_platform.migration.schedule import Chunk
from eplb_platform.runtime import Balancer, start_balancer
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams
from eplb_platform.testing.simulated_collective import SimulatedCollective
from tests.processes.common_end import CommonEnd
from tests.processes.tagged_model import TaggedModel
from tests.simulated_backend import SimulatedCollectiveBackend

FAULT_RANK = 1


@dataclass(frozen=True)
class ForwardRun:
    """What is asked of one run, the same on every rank."""

    steps: int = 160
    """At least; see `until`."""
    until: Mapping[str, int] = field(default_factory=dict)
    """Serve on until the statistics of every rank have at least these numbers."""
    action: str = ""
    """Name of an `ACTIONS` entry, called before every step."""
    timeout_s: float = 60.0
    verify: bool = True
    mixed_step_times: bool = False
    config: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ForwardResult:
    """What one rank saw."""

    wrong_tokens: int
    misplaced_experts: int
    stats: dict[str, int | float | str | None]
    errors: str
    """Why cycles failed, one line each."""
    enqueued: list[tuple[int, tuple[int, ...]]]
    """Boundary and layers of what the forward thread enqueued."""
    groups_opened: int
    exchanges_of_other_threads: int
    physical_to_logical: NDArray[np.int32]


class ObservedBackend(SimulatedCollectiveBackend):
    """Notes when its batches are enqueued, and loses one if told to."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.streams = SimulatedStreams(SimulatedDevice(seed=os.getpid() + rank))
        self.groups_opened = 0
        self.loses_next = False

    def _new_device_group(self, store: Store) -> DeviceGroup:
        self.groups_opened += 1
        assert isinstance(self.streams, SimulatedStreams)
        group = SimulatedCollective(self.streams, store, self._place[0])
        enqueue = group.exchange

        def exchange(sends: Sequence[Message], receives: Sequence[Message]) -> None:
            lost, self.loses_next = self.loses_next, False
            enqueue([] if lost else sends, receives)

        group.exchange = exchange  # type: ignore[method-assign]
        return group


def lose_a_batch(balancer: Balancer, backend: ObservedBackend, step: int) -> None:
    """The device of one rank stops in the middle of the first exchange."""
    if step == 0 and balancer._link.rank == FAULT_RANK:
        backend.loses_next = True


def refuse_one_enqueue(balancer: Balancer, backend: ObservedBackend, step: int) -> None:
    """One rank never enqueues its part of the first exchange: its forward thread captures a graph."""
    if step == 0 and balancer._link.rank == FAULT_RANK:
        group, streams = balancer._link.group, backend.streams
        enqueue = group.enqueue
        assert isinstance(streams, SimulatedStreams)

        def captured(chunk: Chunk) -> None:
            group.enqueue = enqueue  # type: ignore[method-assign]
            streams.is_capturing = True
            try:
                enqueue(chunk)
            finally:
                streams.is_capturing = False

        group.enqueue = captured  # type: ignore[method-assign]


def fail_to_open_once(balancer: Balancer, backend: ObservedBackend, step: int) -> None:
    """The batch is lost, and the first attempt at a new group fails on one rank too."""
    lose_a_batch(balancer, backend, step)
    if step == 0 and balancer._link.rank == FAULT_RANK:
        group = balancer._link.group
        open_exchange = group.open_exchange

        def broken(epoch: int) -> None:
            group.open_exchange = open_exchange  # type: ignore[method-assign]
            raise RuntimeError("no new group")

        group.open_exchange = broken  # type: ignore[method-assign]


def pause_and_resume_often(balancer: Balancer, backend: ObservedBackend, step: int) -> None:
    if step % 7 == 3:
        balancer.pause()
    if step % 7 == 5:
        balancer.resume()


def drain_often(balancer: Balancer, backend: ObservedBackend, step: int) -> None:
    if step % 9 == 5:
        balancer.drain()
        assert balancer.state == "idle"


def reload_often(balancer: Balancer, backend: ObservedBackend, step: int) -> None:
    """The engine loads its weights anew, in the initial layout."""
    if step % 13 == 8:
        model = balancer._model
        assert isinstance(model, TaggedModel)
        balancer.invalidate(model.expert_map)
        await_forward_stream(backend)  # a loader writes on the host here, not on the forward stream
        model.reload_weights(model.expert_map)


def close_early(balancer: Balancer, backend: ObservedBackend, step: int) -> None:
    if step == 25:
        balancer.close()


ACTIONS = {
    action.__name__: action
    for action in (
        lose_a_batch,
        refuse_one_enqueue,
        fail_to_open_once,
        pause_and_resume_often,
        drain_often,
        reload_often,
        close_early,
    )
}


def serve_by_forward(rank: int, num_ranks: int, store: Store, run: ForwardRun) -> ForwardResult:
    """Serve `run.steps` passes; the device has done what was enqueued when a pass reads its weights."""
    backend = ObservedBackend(rank)
    model = TaggedModel(backend, store, rank, num_ranks, num_redundant_experts=5)
    options = {
        "dynamic_eplb": True,
        "expert_heat_collection_interval": 12,
        "algorithm_execution_interval": 0,
        "load_windows": 4,
        "transfer_timeout_s": run.timeout_s,
        "verify_transfers": run.verify,
        **run.config,
    }
    config = EplbConfig.from_additional_config({"eplb_config": options}, environ={})
    balancer = start_balancer(config, model, backend, store, rank)
    enqueued = note_enqueues(balancer)
    exchanges = 0

    def exchange(sends: Sequence[Message], receives: Sequence[Message]) -> None:
        nonlocal exchanges
        exchanges += 1

    backend.exchange = exchange  # type: ignore[method-assign]  # from now on nobody waits for one
    wrong = 0
    errors: dict[str, None] = {}
    pauses = random.Random(rank)
    end = CommonEnd(store, rank, range(num_ranks))
    for step in itertools.count():
        stats = balancer.stats.as_dict()
        is_enough = step + 2 >= run.steps and all(
            int(stats[name] or 0) >= number for name, number in run.until.items()
        )
        if end.has_come(step, is_enough):
            break
        if run.action:
            ACTIONS[run.action](balancer, backend, step)
        if run.mixed_step_times:
            time.sleep(pauses.random() * 0.02 * rank)
        await_forward_stream(backend)
        failed, load = model.forward(step)
        wrong += failed
        if balancer.state != "closed":
            balancer.step(load)
        errors[str(balancer.stats.last_error)] = None
    await_forward_stream(backend)
    misplaced = model.misplaced_experts(balancer.expert_map)
    balancer.close()
    return ForwardResult(
        wrong,
        misplaced,
        balancer.stats.as_dict(),
        "\n".join(errors),
        enqueued,
        backend.groups_opened,
        exchanges,
        balancer.expert_map.physical_to_logical,
    )


def note_enqueues(balancer: Balancer) -> list[tuple[int, tuple[int, ...]]]:
    group = balancer._link.group
    enqueue = group.enqueue
    enqueued = []

    def noted(chunk: Chunk) -> None:
        enqueued.append((balancer._link.gate.boundary, chunk.layers))
        enqueue(chunk)

    group.enqueue = noted  # type: ignore[method-assign]
    return enqueued


def await_forward_stream(backend: ObservedBackend) -> None:
    mark = backend.streams.record()
    while not backend.streams.passed(mark):
        time.sleep(0.0002)
