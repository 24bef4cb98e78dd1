"""Experts on CPUs that compute the tokens of their own rank and no others.

vLLM's CPU kernels take every id as an index into the local weights, so that a rank of an expert-parallel
group reads beyond them. Here each kernel is given only the (token, choice) pairs whose expert lives on the
rank, one choice a row: foreign choices cost nothing, and a layer takes the time of the rank's load.

How many pairs there are is known only at run time. The MoE layer therefore becomes an opaque operator to
torch.compile, as vLLM has it on every other device; on CPUs alone it lets Dynamo trace the layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from eplb_platform.integrations.vllm.compatibility import replace


def experts_classes() -> list[type[FusedMoEExpertsModular]]:
    """vLLM's CPU experts that are given ids and weights, whatever the weights' type."""
    return [
        found
        for _, found in inspect.getmembers(cpu_moe, inspect.isclass)
        if issubclass(found, FusedMoEExpertsModular) and found.__module__ == cpu_moe.__name__
    ]


def install() -> None:
    """Make every CPU experts class obey its expert map. Idempotent."""
    for experts in experts_classes():
        if "apply" in vars(experts):
            replace(experts, "apply", _on_local_pairs)
    replace(MoERunner, "_select_forward", _opaque_with_expert_parallelism)


def _on_local_pairs(apply: Callable[..., None]) -> Callable[..., None]:
    names = tuple(inspect.signature(apply).parameters)[1:]

    def apply_to_local_pairs(self: FusedMoEExpertsModular, *args: Any, **kwargs: Any) -> None:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        expert_map = arguments["expert_map"]
        if expert_map is None:
            if self.moe_config.moe_parallel_config.use_ep:
                raise RuntimeError(f"{type(self).__name__} was given no expert map with expert parallelism")
            apply(self, **arguments)
            return
        output, topk_ids = arguments["output"], arguments["topk_ids"]
        rows, weights, ids = local_pairs(topk_ids, arguments["topk_weights"], expert_map)
        if not len(rows):
            output.zero_()
            return
        hidden_states = arguments["hidden_states"].index_select(0, rows)
        pair_output = output.new_empty(len(rows), output.shape[-1])
        arguments.update(
            output=pair_output,
            hidden_states=hidden_states,
            topk_weights=weights,
            topk_ids=ids,
            expert_map=None,
        )
        apply(self, **arguments)
        sum_pairs(pair_output, rows, output)

    return apply_to_local_pairs


def local_pairs(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The (token, choice) pairs of this rank by token: rows [pairs], weights and local ids [pairs, 1].

    topk_ids: [tokens, choices], physical experts of the whole group, -1 for none; topk_weights: as topk_ids;
    expert_map: [physical experts], the local id of each, -1 for those of other ranks.
    """
    local = expert_map[topk_ids]
    # An id of -1 has taken the last entry of the map.
    is_local = (local >= 0) & (topk_ids >= 0)
    rows, choices = is_local.nonzero(as_tuple=True)
    ids = local[rows, choices].to(torch.int32).unsqueeze(1)
    return rows, topk_weights[rows, choices].unsqueeze(1), ids


def sum_pairs(pair_output: torch.Tensor, rows: torch.Tensor, output: torch.Tensor) -> None:
    """Fill `output`, [tokens, hidden], with the sums of the pairs of each token; 0 where there are none.

    pair_output: [pairs, hidden]; rows: [pairs], ascending. The sum is taken in float32.
    """
    if output.dtype == torch.float32:
        output.zero_().index_add_(0, rows, pair_output)
        return
    total = torch.zeros(output.shape, dtype=torch.float32)
    output.copy_(total.index_add_(0, rows, pair_output.float()))


def _opaque_with_expert_parallelism(select: Callable[..., Any]) -> Callable[..., Any]:
    def select_forward(self: MoERunner) -> Any:
        if not self.moe_config.moe_parallel_config.use_ep:
            return select(self)
        if self.shared_experts is None:
            return torch.ops.vllm.moe_forward
        return torch.ops.vllm.moe_forward_shared

    return select_forward
