"""Dispatch and combine between data-parallel ranks over gloo, which vLLM's CPU communicator lacks.

With data and expert parallelism together every rank computes its experts for the tokens of all: vLLM gathers
them (`all_gatherv`) and gives each rank the sums for its own (`reduce_scatterv`). The ranks have different
numbers of tokens. Both are built on gloo's all-to-all, its one collective with parts of different sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def install() -> None:
    """Add what `CpuCommunicator` does not have itself. Idempotent."""
    for name, method in (("all_gatherv", all_gatherv), ("reduce_scatterv", reduce_scatterv)):
        if getattr(CpuCommunicator, name) is getattr(DeviceCommunicatorBase, name):
            setattr(CpuCommunicator, name, method)


def all_gatherv(
    self: DeviceCommunicatorBase,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """The rows of all ranks, by rank; of several tensors with as many rows each, in one exchange.

    sizes: [ranks], rows of each rank; equal numbers if not given. Raises ValueError for another `dim` than 0,
    or if `sizes` does not fit the rows of this rank.
    """
    if dim != 0:
        raise ValueError(f"all_gatherv gathers along dim 0 only, not {dim}")
    tensors = [input_] if isinstance(input_, torch.Tensor) else list(input_)
    num_rows = tensors[0].shape[0]
    sizes = [num_rows] * self.world_size if sizes is None else list(sizes)
    own = sizes[self.rank_in_group] if len(sizes) == self.world_size else None
    if any(tensor.shape[0] != own for tensor in tensors):
        rows = [tensor.shape[0] for tensor in tensors]
        raise ValueError(f"rank {self.rank_in_group} of {self.world_size} gives {rows} rows, sizes: {sizes}")
    if self.world_size == 1:
        return input_
    packed = torch.cat([_as_bytes(tensor) for tensor in tensors], dim=1)
    gathered = packed.new_empty(sum(sizes), packed.shape[1])
    dist.all_to_all_single(
        gathered,
        packed.repeat(self.world_size, 1),
        output_split_sizes=sizes,
        input_split_sizes=[num_rows] * self.world_size,
        group=self.device_group,
    )
    widths = [_row_bytes(tensor) for tensor in tensors]
    # Cloned: a part that is contiguous as it is, of a single row, may lie where its type cannot.
    parts = [
        part.clone(memory_format=torch.contiguous_format).view(tensor.dtype).view(-1, *tensor.shape[1:])
        for part, tensor in zip(gathered.split(widths, dim=1), tensors, strict=True)
    ]
    return parts[0] if isinstance(input_, torch.Tensor) else parts


def reduce_scatterv(
    self: DeviceCommunicatorBase, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """The sum over the ranks of this rank's part of `input_`, taken in float32 in the order of the ranks.

    sizes: [ranks], the length of each rank's part along `dim`; equal lengths if not given. Raises ValueError
    if `sizes` does not fit the input.
    """
    if self.world_size == 1:
        return input_
    parts = input_.movedim(dim, 0).contiguous()
    if sizes is None:
        sizes = [parts.shape[0] // self.world_size] * self.world_size
    if len(sizes) != self.world_size or sum(sizes) != parts.shape[0]:
        raise ValueError(f"{self.world_size} ranks cannot share {parts.shape[0]} rows by sizes {sizes}")
    own = sizes[self.rank_in_group]
    received = parts.new_empty(self.world_size * own, *parts.shape[1:])
    dist.all_to_all_single(
        received,
        parts,
        output_split_sizes=[own] * self.world_size,
        input_split_sizes=list(sizes),
        group=self.device_group,
    )
    return _sum(received.split(own) if own else [received], parts.dtype).movedim(0, dim)


def _sum(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    is_narrow = dtype in (torch.bfloat16, torch.float16)
    total = parts[0].float() if is_narrow else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, bytes of a row]"""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])).contiguous().view(torch.uint8)


def _row_bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()
