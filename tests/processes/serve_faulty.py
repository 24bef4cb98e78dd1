"""The demo's model under faults of the machine: what one rank does, for `RankPool`."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist

from eplb_platform import EplbConfig, load_backend
from eplb_platform.runtime import start_balancer
from eplb_platform.runtime.store_plane import StoreControlPlane

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eplb_platform.backend import Message
    from eplb_platform.integrations.transformers import ExpertParallelModel
    from eplb_platform.runtime import Balancer

Exchange: TypeAlias = "Callable[[Sequence[Message], Sequence[Message]], None]"

CHECKPOINT = Path(__file__).resolve().parents[2] / "eplb_platform" / "demo" / "checkpoint"
MODEL_TIMEOUT_S = 120.0
TRANSFER_TIMEOUT_S = 4.0
FULL_DISK_BYTES = 512
REQUEST_PASSES = 12
CONTEXT = 8


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and on which rank."""

    kind: str
    """stopped, killed, full disk, slow store, store gone, or nothing."""
    record: Path
    rank: int = 2
    passes: int = 6000
    """At most; a run ends once it has seen a cycle succeed after the fault."""


@dataclass
class Seen:
    """What one rank saw."""

    wrong_passes: int = 0
    passes: int = 0
    stats: dict[str, int | float | str | None] = field(default_factory=dict)
    moved_after: int = 0
    """Cycles that ended well after the fault."""
    records_after: int = 0
    error: str = ""
    """Of the model's own collective."""
    threads_left: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


class Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


class Injector:
    """Makes the fault happen once, at its stage or between two passes."""

    def __init__(self, fault: Fault, rank: int, store: dist.Store) -> None:
        self._fault, self._rank, self._store = fault, rank, store
        self._is_armed = True
        self.balancer: Balancer | None = None
        self.server: dist.TCPStore | None = None

    def before_transfer(self, exchange: Exchange) -> Exchange:
        """In the background thread, when others are already inside."""

        def faulty(sends: Sequence[Message], receives: Sequence[Message]) -> None:
            if (
                self._is_armed
                and self._rank == self._fault.rank
                and self._fault.kind in ("stopped", "killed")
            ):
                self._is_armed = False
                self._store.set("fault", "1")
                os.kill(os.getpid(), signal.SIGSTOP if self._fault.kind == "stopped" else signal.SIGKILL)
            exchange(sends, receives)

        return faulty

    def between_passes(self, step: int) -> None:
        kind = self._fault.kind
        if not self._is_armed or step != 40:
            return
        if kind == "full disk" and self._rank == 0:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, most))
        elif kind == "slow store" and self._rank == self._fault.rank:
            StoreControlPlane.read = _slow(StoreControlPlane.read)  # type: ignore[method-assign]
        elif kind == "store gone":
            assert self.balancer is not None
            self.balancer.drain()
            dist.barrier()  # the model's own
            self.server = None
        if kind in ("full disk", "slow store", "store gone", "nothing"):
            self._is_armed = False
            self._store.set("fault", "1")

    def undo(self) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        StoreControlPlane.read = _READ  # type: ignore[method-assign]


_READ = StoreControlPlane.read


def _slow(method):  # type: ignore[no-untyped-def]
    async def read(self: StoreControlPlane, key: str) -> str | None:
        time.sleep(0.03)
        found: str | None = await method(self, key)
        return found

    return read


def serve_faulty(rank: int, num_ranks: int, store: dist.Store, fault: Fault) -> Seen:
    """Serve the same requests again and again under a balancer until a cycle succeeds after the fault."""
    seen = Seen()
    logging.getLogger("eplb_platform").addHandler(handler := Lines(seen.log))
    model = _open_model(rank, num_ranks, store)
    expected = [_forward(model, rank, number) for number in range(REQUEST_PASSES)]
    injector = Injector(fault, rank, store)
    balancer = _start(model, rank, num_ranks, store, fault, injector)
    try:
        _serve(model, balancer, injector, store, rank, fault, expected, seen)
    except RuntimeError as error:
        seen.error = str(error)
        dist.destroy_process_group()  # as at the end of its process: others may wait for this rank alone
    finally:
        injector.undo()
        balancer.close()
        logging.getLogger("eplb_platform").removeHandler(handler)
    seen.stats = balancer.stats.as_dict()
    seen.threads_left = [t.name for t in threading.enumerate() if t.name.startswith("eplb")]
    return seen


def _open_model(rank: int, num_ranks: int, store: dist.Store) -> ExpertParallelModel:
    from eplb_platform.integrations.transformers import load_expert_parallel

    torch.set_num_threads(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    timeout = timedelta(seconds=MODEL_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    return load_expert_parallel(
        CHECKPOINT, rank=rank, num_ranks=num_ranks, backend=load_backend("cpu"), num_redundant_experts=16
    )


def _start(
    model: ExpertParallelModel, rank: int, num_ranks: int, store: dist.Store, fault: Fault, injector: Injector
) -> Balancer:
    config = EplbConfig(
        dynamic_eplb=True,
        expert_heat_collection_interval=16,
        algorithm_execution_interval=0,
        transfer_timeout_s=TRANSFER_TIMEOUT_S if fault.kind == "stopped" else 60.0,
        expert_map_record_path=str(fault.record),
        layer_updates_per_step=4,
    )
    theirs = store
    if fault.kind == "store gone":
        if rank == 0:
            injector.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            store.set("port", str(injector.server.port))
        port = int(store.get("port"))
        theirs = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    backend = load_backend("cpu")
    balancer = start_balancer(config, model, backend, theirs, rank)
    backend.exchange = injector.before_transfer(backend.exchange)  # type: ignore[method-assign]
    injector.balancer = balancer
    return balancer


@torch.inference_mode()
def _forward(model: ExpertParallelModel, rank: int, number: int) -> list[int]:
    text = bytes((rank * 31 + number * 7 + i * 3) % 96 + 32 for i in range(CONTEXT))
    output = model.module(input_ids=torch.tensor([list(text)]), use_cache=False)
    tokens: list[int] = output.logits[0].argmax(-1).tolist()
    return tokens


def _serve(
    model: ExpertParallelModel,
    balancer: Balancer,
    injector: Injector,
    store: dist.Store,
    rank: int,
    fault: Fault,
    expected: list[list[int]],
    seen: Seen,
) -> None:
    model.take_load()
    before: int | None = None
    for step in range(fault.passes):
        injector.between_passes(step)
        number = step % REQUEST_PASSES
        seen.wrong_passes += _forward(model, rank, number) != expected[number]
        seen.passes += 1
        balancer.step(model.take_load())
        balancer.rebalance_now() if step % 16 == 15 else None
        stats = balancer.stats
        still_before = fault.kind == "stopped" and not stats.failed_cycles
        if store.check(["fault"]) and (before is None or still_before):
            before = stats.cycles
            records = stats.records_written
        if before is not None:
            seen.moved_after = stats.cycles - before
            seen.records_after = stats.records_written - records
        # All ranks end at one pass: the first rank names it, two ahead.
        is_enough = stats.failed_cycles >= 1 if fault.kind == "store gone" else seen.moved_after >= 2
        if fault.kind == "full disk":
            is_enough = is_enough and bool(stats.failed_records)
        if rank == 0 and is_enough and not store.check(["stop"]):
            store.set("stop", str(step + 2))
        if store.check(["stop"]) and step >= int(store.get("stop")):
            return
