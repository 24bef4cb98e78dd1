"""Logical to physical ids by `npu_moe_update_expert`, one operator in place of a dozen, where it can do it.

Its rule is row modulo the number of replicas, which is not the rule of the other backends: every second row
for one expert of two replicas goes to one of them. It knows no padding, and no more than 512 tokens, 16
experts a token, 1,023 logical experts, and as many columns as there are ranks. Hence chosen by an option, and
the shared rule wherever the shapes are others.
"""

from __future__ import annotations

from typing import Protocol

import torch

MAX_TOKENS = 512
MAX_TOP_K = 16
MAX_LOGICAL = 1023
MAX_PHYSICAL = 1024

_BY_TOKEN = 1


class UpdateExpert(Protocol):
    """The operator, as far as it is used."""

    def __call__(
        self, expert_ids: torch.Tensor, eplb_table: torch.Tensor, /, *, balance_mode: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def can_map(logical_ids: torch.Tensor, logical_to_physical: torch.Tensor, num_ranks: int) -> bool:
    """Whether the operator takes these shapes. The ids are on the device, and are not looked at."""
    num_logical, width = logical_to_physical.shape
    return (
        0 < logical_ids.shape[0] <= MAX_TOKENS
        and 0 < logical_ids.shape[1] <= min(MAX_TOP_K, num_logical)
        and num_logical <= MAX_LOGICAL
        and width <= num_ranks
    )


def eplb_table(
    logical_to_physical: torch.Tensor, replica_count: torch.Tensor, offset: int = 0
) -> torch.Tensor:
    """int32 [logical, 1 + width]: the number of an expert's replicas, then they, turned by `offset`."""
    count = replica_count.long().unsqueeze(1)
    columns = torch.arange(logical_to_physical.shape[1], device=logical_to_physical.device).unsqueeze(0)
    turned = logical_to_physical.gather(1, (columns + offset) % count)
    return torch.cat([count, turned.long()], dim=1).int()


def map_and_record(
    update_expert: UpdateExpert,
    logical_ids: torch.Tensor,
    logical_to_physical: torch.Tensor,
    replica_count: torch.Tensor,
    load: torch.Tensor | None,
    offset: int = 0,
) -> torch.Tensor:
    """As `Backend.map_and_record`, with the operator's choice of replicas."""
    ids = logical_ids.long()
    is_padding = ids == -1
    table = eplb_table(logical_to_physical, replica_count, offset)
    mapped, _ = update_expert(ids.masked_fill(is_padding, 0), table, balance_mode=_BY_TOKEN)
    physical = mapped.long()
    if load is not None:
        counted = is_padding.logical_not().flatten().to(load.dtype)
        load.scatter_add_(0, physical.flatten(), counted)
    return physical.masked_fill(is_padding, -1)


def answers_as_documented(update_expert: UpdateExpert, device: torch.device) -> bool:
    """Whether the operator follows its rule on a table of 1,024 physical experts. Waits for the device.

    What its documentation calls ids of ranks are ids of experts in its example: asked once, at start.
    """
    counts = torch.arange(256) % 7 + 1
    places = torch.arange(MAX_PHYSICAL).flip(0)
    starts = counts.cumsum(0) - counts
    columns = torch.arange(8)
    table = torch.where(columns < counts[:, None], places[(starts[:, None] + columns) % MAX_PHYSICAL], -1)
    ids = (torch.arange(MAX_TOKENS)[:, None] * 37 + torch.arange(8) * 11) % 256
    rows = torch.arange(MAX_TOKENS)[:, None]
    expected = table[ids, rows % counts[ids]]
    try:
        given = map_and_record(update_expert, ids.to(device), table.to(device), counts.to(device), None)
        return bool(torch.equal(given.cpu(), expected))
    except RuntimeError:  # an operator that this device has no kernel for
        return False
