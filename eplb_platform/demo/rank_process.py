"""What one rank's process does in one phase.

The modules that take seconds to import are imported at the top: the process that all ranks are forked from
imports this one once.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from eplb_platform.backend import Backend, load_backend
from eplb_platform.config import EplbConfig
from eplb_platform.demo.devices import group_backend, take_device
from eplb_platform.demo.measures import load_by_rank
from eplb_platform.demo.messages import Failure, Orders, Progress, RankResult
from eplb_platform.demo.schedule import RankBatch
from eplb_platform.demo.serving import serve
from eplb_platform.demo.unequal_experts import RepeatingMoe, give_repeats
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.integrations.transformers import (
    ExpertParallelModel,
    ExpertParallelMoe,
    load_expert_parallel,
)
from eplb_platform.runtime import Balancer, start_balancer
from eplb_platform.runtime.stats import BalancerStats
from eplb_platform.topology import Topology

REPORT_EVERY = 12
"""Forward passes between two reports of progress."""
GROUP_TIMEOUT = timedelta(minutes=10)
"""One rank compiles what plans, which takes a busy machine minutes; a rank that dies is noticed at once."""
RECORD_TIMEOUT_S = 120.0


def run_rank(orders: Orders, reports: Connection) -> None:
    """The process's main function: serve the phase and report."""
    _become_quiet(orders.log)
    _end_with_parent()
    try:
        reports.send(_serve_phase(orders, reports))
    except BaseException as error:
        traceback.print_exc()
        reports.send(Failure(f"{type(error).__name__}: {error}", time.monotonic()))
        reports.close()
        os._exit(1)


def _become_quiet(log: Path) -> None:
    """Write what this process prints into the log, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.enable()


def _end_with_parent() -> None:
    """End this process when its parent does, even when the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def end() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end, name="end-with-parent", daemon=True).start()


def _serve_phase(orders: Orders, reports: Connection) -> RankResult:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", orders.store_port, is_master=False, timeout=GROUP_TIMEOUT)
    device = take_device(orders.backend, orders.rank)
    dist.init_process_group(
        group_backend(device, orders.num_ranks),
        store=dist.PrefixStore("model", store),
        rank=orders.rank,
        world_size=orders.num_ranks,
        timeout=GROUP_TIMEOUT,
    )
    config = (
        None
        if orders.eplb_config is None
        else EplbConfig.from_additional_config(orders.eplb_config, environ={})
    )
    backend = load_backend(orders.backend)
    model = _load_model(orders, config, backend)
    if orders.repeats is not None:
        give_repeats(model, orders.repeats)
    _warm_up(model, orders.batches[0])
    balancer = None if config is None else start_balancer(config, model, backend, store, orders.rank)
    reporter = Reporter(orders.num_ranks, balancer, reports)
    served = serve(model, orders.batches, reporter.after_forward)
    if balancer is not None and config is not None:
        if not config.moves_experts:
            _await_record(balancer)
        balancer.close()
    dist.barrier()
    dist.destroy_process_group()
    load = load_by_rank(served.load, orders.num_ranks)
    stats = balancer.stats if balancer else None
    return RankResult(served.tokens, load, served.forward_ms, stats, reporter.expert_ms_by_commit())


def _await_record(balancer: Balancer) -> None:
    """A cycle that moves nothing needs no further pass, and on a busy machine may outlast the phase."""
    deadline = time.monotonic() + RECORD_TIMEOUT_S
    while balancer.state != "idle" and time.monotonic() < deadline:
        time.sleep(0.005)


def _load_model(orders: Orders, config: EplbConfig | None, backend: Backend) -> ExpertParallelModel:
    """The model with its initial placement, or with the static map that the configuration names."""
    expert_map = None
    if config is not None and config.expert_map_path:
        topology = Topology(orders.num_ranks)
        experts = orders.num_logical_experts
        expert_map = ExpertMap.load(config.expert_map_path, num_logical_experts=experts, topology=topology)
    return load_expert_parallel(
        orders.model,
        rank=orders.rank,
        num_ranks=orders.num_ranks,
        backend=backend,
        expert_map=expert_map,
        num_redundant_experts=orders.redundant_experts,
        moe_class=ExpertParallelMoe if orders.repeats is None else RepeatingMoe,
    )


def _warm_up(model: ExpertParallelModel, batch: RankBatch) -> None:
    """Serve a prefill and a decode step, uncounted: what is set up on first use is set up now."""
    serve(model, [RankBatch(batch.prompts, min(2, batch.forwards))], lambda load, phase: None)


class Reporter:
    """Steps the balancer after each forward pass and tells the parent how far this rank is."""

    def __init__(self, num_ranks: int, balancer: Balancer | None, reports: Connection) -> None:
        self._num_ranks = num_ranks
        self._before_commit: NDArray[np.float64] | None = None
        self._balancer = balancer
        self._reports = reports
        self._step = 0
        self._recent: list[NDArray[np.int64]] = []

    def after_forward(self, load: NDArray[np.int64], phase: Phase) -> None:
        if self._balancer is not None:
            self._balancer.step(load, phase=phase)
            if self._before_commit is None and self._balancer.stats.commits:
                self._before_commit = self._expert_ms()
        self._step += 1
        self._recent.append(load)
        if len(self._recent) == REPORT_EVERY:
            self._report()

    def expert_ms_by_commit(self) -> NDArray[np.float64] | None:
        """[2, layers], before the first commit and after it; None where nothing was timed."""
        whole = self._expert_ms()
        if whole is None or self._before_commit is None:
            return None
        return np.stack([self._before_commit, whole - self._before_commit])

    def _expert_ms(self) -> NDArray[np.float64] | None:
        profiling = None if self._balancer is None else self._balancer.profiling
        return None if profiling is None else np.asarray(profiling.profiler.get_totals()[0].sum(axis=1))

    def _report(self) -> None:
        load = load_by_rank(np.stack(self._recent), self._num_ranks)
        stats = self._balancer.stats if self._balancer is not None else BalancerStats()
        self._reports.send(Progress(self._step, load, stats.moved_experts, stats.cycles))
        self._recent.clear()
