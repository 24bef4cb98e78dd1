"""Expert load from what the operators of Ascend report: the tokens of each expert on this rank."""

from __future__ import annotations

import torch

CUMULATIVE, COUNTS = 0, 1
"""The values of `group_list_type` (`expert_token_nums_type`, `expert_tokens_num_type`) that can be read."""


def counts_of(group_list: torch.Tensor, group_list_type: int) -> torch.Tensor:
    """int64 [slots]: tokens of each expert on this rank. Does not synchronise, and can be captured.

    group_list: int32 or int64 [slots], as `npu_moe_distribute_dispatch` and `npu_moe_init_routing_v2` give
        it and `npu_grouped_matmul` takes it
    group_list_type: 0, cumulative sums; 1, counts
    """
    if group_list.dim() != 1 or group_list.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"group_list must be int32 or int64 [slots], got {group_list.dtype} {list(group_list.shape)}"
        )
    if group_list_type == COUNTS:
        return group_list.long()
    if group_list_type == CUMULATIVE:
        sums = group_list.long()
        return torch.cat([sums[:1], sums[1:] - sums[:-1]])
    raise ValueError(f"group_list_type must be 0 (cumulative sums) or 1 (counts), got {group_list_type}")


def add_to_load(
    load: torch.Tensor, group_list: torch.Tensor, group_list_type: int, *, first_slot: int
) -> None:
    """Add the tokens of this rank's experts to their places in `load`, in place. As `counts_of` otherwise.

    load: int32 or int64 [physical], as `Backend.map_and_record` counts it
    first_slot: physical id of the first expert on this rank

    Every token is counted by the rank that computes it: sum over the ranks, and leave out the `load` of
    `map_and_record`, which counts the tokens of the rank that sends them.
    """
    counts = counts_of(group_list, group_list_type)
    if load.dim() != 1 or load.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"load must be int32 or int64 [physical], got {load.dtype} {list(load.shape)}")
    end = first_slot + counts.numel()
    if not 0 <= first_slot <= end <= load.numel():
        raise ValueError(f"slots {first_slot} to {end - 1} do not lie in a load of {load.numel()} experts")
    load[first_slot:end].add_(counts)
