"""The Ascend backend between real processes over gloo, on host memory with a fake of torch_npu.

It cannot show what a device, its streams or HCCL do.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.distributed import Store

from eplb_platform.backend import Message
from eplb_platform.testing.contract import clauses, run_check
from eplb_platform.testing.processes import RankPool
from tests.ascend.host_ascend import HostAscend
from tests.fake_torch_npu import NZ, values_of

pytestmark = pytest.mark.processes

SHAPES = ((30, 50), (17, 33), (64, 128))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=600.0) as pair:
        yield pair


@pytest.mark.parametrize("clause", clauses(2))
def test_the_contract_is_kept(pool: RankPool, clause: str) -> None:
    result = run_check(pool, HostAscend, clause)
    assert result.passed, result.detail


def weights_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator).half() for shape in SHAPES]


def exchange_experts(rank: int, num_ranks: int, store: Store) -> list[int]:
    """Both ranks send an expert, two matrices in NZ and one plain, and take the other's in its place."""
    backend = HostAscend()
    backend.connect(store, rank, num_ranks, timeout_s=120.0)
    try:
        backend.warm_up()
        peer = 1 - rank
        own = [backend.torch_npu.npu_format_cast(tensor, NZ) for tensor in weights_of(rank)[:2]]
        own.append(weights_of(rank)[2])
        staging = [backend.allocate_staging([tensor], 1)[0] for tensor in own]
        addresses = [tensor.data_ptr() for tensor in own]
        before = backend.checksum(own)
        with backend.streams.transfer():
            backend.exchange(
                [Message(peer, tensor) for tensor in own], [Message(peer, tensor) for tensor in staging]
            )
        for tensor, staged in zip(own, staging, strict=True):
            backend.swap_in([tensor], [0], [staged], [0])
        for tensor, expected in zip(own, weights_of(peer), strict=True):
            assert torch.equal(values_of(tensor), expected)
        assert [tensor.data_ptr() for tensor in own] == addresses
        return [before, backend.checksum(own)]
    finally:
        backend.close()


def test_nz_experts_change_places_between_ranks(pool: RankPool) -> None:
    first, second = pool.run(exchange_experts)
    assert first == second[::-1]
    assert first[0] != first[1]
