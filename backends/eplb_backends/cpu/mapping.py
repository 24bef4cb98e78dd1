"""Logical to physical ids on the host: what the kernel takes and gives, as tensors."""

from __future__ import annotations

import numpy as np
import torch

from eplb_backends.cpu.kernels import ALL_MAPPED, NOT_COUNTED, Integers, map_ids

_NO_LOAD = np.zeros(0, np.int64)


def map_and_record(
    logical_ids: torch.Tensor,
    logical_to_physical: torch.Tensor,
    replica_count: torch.Tensor,
    load: torch.Tensor | None,
    offset: int,
) -> torch.Tensor:
    """As `Backend.map_and_record`; `load` may be int32 too, in which vLLM counts."""
    if logical_ids.dim() != 2 or replica_count.shape[0] != logical_to_physical.shape[0]:
        raise ValueError(
            "expected logical_ids [tokens, top_k], logical_to_physical [logical, width], "
            f"replica_count [logical]; got {list(logical_ids.shape)}, {list(logical_to_physical.shape)}, "
            f"{list(replica_count.shape)}"
        )
    if load is not None and not (load.dtype in (torch.int32, torch.int64) and load.is_contiguous()):
        raise ValueError(
            f"load must be contiguous int32 or int64 to be counted into in place, got {load.dtype}"
        )
    physical_ids = torch.empty(logical_ids.shape, dtype=torch.int64)
    counted = _NO_LOAD if load is None else load.numpy()
    ids, table = _integers(logical_ids), _integers(logical_to_physical)
    counts = _integers(replica_count.to(logical_to_physical.dtype))
    mapped = map_ids(ids, table, counts, counted, load is not None, offset, physical_ids.numpy())
    if mapped == NOT_COUNTED:
        raise ValueError(
            f"tokens go to physical expert {int(physical_ids.max())}, but load counts only {len(counted)}"
        )
    if mapped != ALL_MAPPED:
        row, choice = divmod(mapped, logical_ids.shape[1])
        raise ValueError(
            f"row {row}: {int(logical_ids[row, choice])} is not one of {len(table)} logical experts, "
            "nor -1 for padding"
        )
    return physical_ids


def _integers(tensor: torch.Tensor) -> Integers:
    """The tensor's memory, in one of the types and layouts that the kernel is compiled for."""
    if tensor.dtype not in (torch.int32, torch.int64):
        tensor = tensor.long()
    integers: Integers = tensor.contiguous().numpy()
    return integers
