"""Logical to physical expert ids on CPUs, where vLLM without Triton leaves the ids as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router import base_router

from eplb_platform.backend import Backend, load_backend
from eplb_platform.integrations.vllm.compatibility import replace


def install() -> None:
    """Let vLLM's routers map and count. Idempotent."""
    replace(base_router, "eplb_map_to_physical_and_record", _instead_of_identity)


def _instead_of_identity(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def map_and_record(*args: Any, **kwargs: Any) -> torch.Tensor:
        return map_to_physical_and_record(*args, **kwargs)

    return map_and_record


def map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The physical expert of each choice, [tokens, choices] in the type of `topk_ids`; counts the choices.

    Which replica a token takes depends on its row and the tables alone: the ranks of a tensor-parallel group,
    which all route the same rows, agree on it. Rows that follow each other spread evenly.

    topk_ids: [tokens, choices], -1 for none, which stays -1; expert_load_view: [physical], int32, counted
    into while `record_enabled`, from the first `num_unpadded_tokens` rows; logical_to_physical_map: [logical,
    width]; logical_replica_count: [logical]. Raises ValueError for an id that is no logical expert.
    """
    num_recorded = len(topk_ids)
    if not bool(record_enabled):
        num_recorded = 0
    elif num_unpadded_tokens is not None:
        num_recorded = min(num_recorded, int(num_unpadded_tokens))
    map_and_record = _backend().map_and_record
    parts = []
    if num_recorded:
        parts.append(
            map_and_record(
                topk_ids[:num_recorded], logical_to_physical_map, logical_replica_count, expert_load_view
            )
        )
    if num_recorded < len(topk_ids):
        rest = topk_ids[num_recorded:]
        parts.append(
            map_and_record(rest, logical_to_physical_map, logical_replica_count, None, offset=num_recorded)
        )
    if not parts:
        return topk_ids
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(topk_ids.dtype)


@functools.cache
def _backend() -> Backend:
    return load_backend("cpu")
