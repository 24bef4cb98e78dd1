"""Whole cycles of the balancer beside a model on `npu` devices, by either transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.distributed import Store, TCPStore

from eplb_backends.ascend import AscendBackend
from eplb_platform.backend import Backend
from eplb_platform.demo import rank_process
from eplb_platform.demo.messages import Orders
from eplb_platform.demo.schedule import Text, plan_serving
from eplb_platform.demo.settings import DemoSettings, Serving, check
from eplb_platform.runtime.stats import BalancerStats
from eplb_platform.testing.processes import RankPool
from tests.ascend.over_stub.recorded import Call, calls_of

STEPS = 36


@dataclass(frozen=True)
class Served:
    tokens: list[NDArray[np.uint8]]
    stats: BalancerStats | None
    calls: list[Call]


class Unread:
    """Takes what a rank reports."""

    def send(self, report: object) -> None: ...


def serve(rank: int, num_ranks: int, store: Store, transport: str, log: Path) -> Served:
    """A rank of the demo; without a transport, on the CPU and balancing nothing."""
    settings = check(DemoSettings(ranks=num_ranks, serving=Serving(8, 4, 8)))
    texts = [
        Text(path.stem, np.frombuffer(path.read_bytes(), dtype=np.uint8)) for path in settings.options.texts
    ]
    schedule = plan_serving(
        texts, ranks=num_ranks, steps=STEPS, serving=settings.options.serving, seed=settings.options.seed
    )
    config: dict[str, object] = {
        "backend": "ascend",
        "transport": transport,
        "dynamic_eplb": True,
        "num_redundant_experts": settings.redundant_experts,
        "expert_heat_collection_interval": 4,
        "algorithm_execution_interval": 1,
        "layer_updates_per_step": 4,
    }
    if rank == 0:
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(server.port))
    orders = Orders(
        rank=rank,
        num_ranks=num_ranks,
        store_port=int(store.get("port")),
        model=settings.options.model,
        num_logical_experts=settings.shape.num_logical_experts,
        redundant_experts=settings.redundant_experts if transport else 0,
        backend="ascend" if transport else "cpu",
        eplb_config={"eplb_config": config} if transport else None,
        batches=schedule.of_rank(rank),
        log=log,
    )
    loaded: Callable[[str], Backend] = rank_process.load_backend
    if transport:
        loaded = lambda name: AscendBackend(transport=transport)  # noqa: E731
    results = []
    with mock.patch.object(rank_process, "load_backend", loaded):
        calls = calls_of(lambda: results.append(rank_process._serve_phase(orders, Unread())))  # type: ignore[arg-type]
    store.set(f"done{rank}", "1")
    store.wait([f"done{other}" for other in range(num_ranks)])
    return Served(results[0].tokens, results[0].stats, calls)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", ["pair", "four"])
def test_experts_move_and_tokens_are_the_cpu_s(
    ranks: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pool: RankPool = request.getfixturevalue(ranks)
    still = pool.run(serve, "", tmp_path / "log")
    check_served(pool.run(serve, "host", tmp_path / "log"), still)
    by_hccl = pool.run(serve, "collective", tmp_path / "log")
    check_served(by_hccl, still)
    kinds = {str(call["call"]) for served in by_hccl for call in served.calls}
    assert "HcclBatchSendRecv: send" in kinds
    assert "HcclAlltoAllV" in kinds


def check_served(moved: list[Served], still: list[Served]) -> None:
    for on_device, on_host in zip(moved, still, strict=True):
        for device, host in zip(on_device.tokens, on_host.tokens, strict=True):
            np.testing.assert_array_equal(device, host)
        assert on_device.stats is not None
        assert on_device.stats.failed_cycles == 0, on_device.stats.last_error
        assert on_device.stats.cycles >= 1
        assert on_device.stats.moved_experts > 0
