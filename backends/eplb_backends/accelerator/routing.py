"""Logical to physical ids on a device, in operations that never synchronise and can be captured."""

from __future__ import annotations

import torch

_GOLDEN_RATIO = 2654435769  # 2**32 / 1.618...
_LOW_32_BITS = 0xFFFFFFFF


def map_and_record(
    logical_ids: torch.Tensor,
    logical_to_physical: torch.Tensor,
    replica_count: torch.Tensor,
    load: torch.Tensor | None,
    offset: int = 0,
) -> torch.Tensor:
    """As `Backend.map_and_record`, with the CPU backend's choice of replicas; `load` may be int32 too.

    The host cannot look at the ids: one that is no expert nor -1, or a physical expert that `load` has no
    place for, ends in an error of torch's gather or scatter (on a GPU a device-side assertion).
    """
    if logical_ids.dim() != 2 or replica_count.shape[0] != logical_to_physical.shape[0]:
        raise ValueError(
            "expected logical_ids [tokens, top_k], logical_to_physical [logical, width], "
            f"replica_count [logical]; got {list(logical_ids.shape)}, {list(logical_to_physical.shape)}, "
            f"{list(replica_count.shape)}"
        )
    if load is not None and load.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"load must be int32 or int64, got {load.dtype}")
    ids = logical_ids.long()
    is_padding = ids == -1
    logical = ids.masked_fill(is_padding, 0)
    rows = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) + offset
    fraction = (rows * _GOLDEN_RATIO) & _LOW_32_BITS
    counts = replica_count.long().gather(0, logical.flatten()).view_as(logical)
    replica = (fraction * counts) >> 32
    places = (logical * logical_to_physical.shape[1] + replica).flatten()
    physical = logical_to_physical.reshape(-1).gather(0, places).long().view_as(logical)
    if load is not None:
        counted = physical.masked_fill(is_padding, 0).flatten()
        load.scatter_add_(0, counted, is_padding.logical_not().flatten().to(load.dtype))
    return physical.masked_fill(is_padding, -1)
