"""A group of HCCL for a test's ranks, each on the device with its number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store

from eplb_backends.ascend import environment
from eplb_backends.ascend.hccl_options import HcclOptions

NZ = 29
HALVES = 3
"""HCCL's number of float16."""


@contextmanager
def hccl_group(
    store: Store, rank: int, num_ranks: int, options: Mapping[str, object], timeout_s: float = 300.0
) -> Iterator[None]:
    torch_npu = environment.torch_npu()
    torch.npu.set_device(rank)
    torch.npu.config.allow_internal_format = True
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "hccl",
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=timeout,
        pg_options=HcclOptions(options).to_process_group(torch_npu, timeout),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def nz_weight(rank: int, shape: tuple[int, ...] = (30, 50)) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in NZ on the device, and its values on the host."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).half()
    return torch.ops.npu.npu_format_cast(values.npu(), NZ), values
