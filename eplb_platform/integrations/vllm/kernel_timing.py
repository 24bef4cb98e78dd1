"""Timing vLLM's expert kernels, each of which computes all experts of a layer on this rank.

A kernel object belongs to one layer: its `apply` is wrapped, on any device, between the exchanges of tokens,
so that no waiting for other ranks is measured. In a captured graph no Python runs: there nothing is timed.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from eplb_platform.runtime.compute_profiling import ComputeProfiling, KernelTimers

logger = logging.getLogger(__name__)

_NEEDED = ("topk_ids", "expert_map")
_MARK = "_eplb_platform_timed"


def attach(layers: Sequence[object], profiling: ComputeProfiling) -> None:
    """Have the kernels of these layers timed in the passes that `profiling` measures. Idempotent.

    layers: vLLM's MoE layers, in the order of the expert map's
    """
    untimed = [
        index for index, layer in enumerate(layers) if not _attach(_kernel_of(layer), index, profiling)
    ]
    if untimed:
        logger.warning(
            "layers %s have a kernel that routes tokens by itself, or none: their experts are not timed",
            ", ".join(map(str, untimed)),
        )


def _kernel_of(layer: object) -> object | None:
    """The object whose `apply` computes the experts of a layer, made when vLLM has loaded the weights."""
    method = getattr(layer, "_quant_method", None) or getattr(layer, "quant_method", None)
    return getattr(getattr(method, "moe_kernel", None), "fused_experts", None)


def _attach(kernel: object | None, layer: int, profiling: ComputeProfiling) -> bool:
    apply: Callable[..., Any] | None = getattr(kernel, "apply", None)
    if apply is None:
        return False
    if getattr(kernel, _MARK, False):
        return True
    names = tuple(inspect.signature(apply).parameters)
    if any(name not in names for name in _NEEDED):
        return False

    @functools.wraps(apply)
    def timed(*args: Any, **kwargs: Any) -> Any:
        timers = profiling.current
        if not isinstance(timers, KernelTimers):
            return apply(*args, **kwargs)
        try:
            timers.timers[layer].start()
        except RuntimeError:  # a graph is being captured
            return apply(*args, **kwargs)
        output = apply(*args, **kwargs)
        timers.timers[layer].stop()
        given = dict(zip(names, args, strict=False)) | kwargs
        count_local(given, timers.tokens[layer])
        timers.was_timed[layer] = True
        return output

    setattr(kernel, "apply", timed)  # noqa: B010 - of this object alone
    setattr(kernel, _MARK, True)
    return True


def count_local(given: dict[str, Any], counts: torch.Tensor) -> None:
    """Fill `counts`, [slots], with the tokens that a kernel computed for each slot. Does not synchronise.

    given: the arguments of `apply`. Where tokens came sorted by expert, vLLM knows their numbers; else
    they are counted: `topk_ids` are physical experts of the whole group, `expert_map` says which are local.
    """
    known = getattr(given.get("expert_tokens_meta"), "expert_num_tokens", None)
    if known is not None and known.shape == counts.shape:
        counts.copy_(known)
        return
    ids, expert_map = given["topk_ids"].flatten().long(), given["expert_map"]
    local = ids if expert_map is None else expert_map[ids].long()
    is_local = (ids >= 0) & (local >= 0)
    with_others = torch.zeros(len(counts) + 1, dtype=counts.dtype, device=counts.device)
    with_others.scatter_add_(0, torch.where(is_local, local, len(counts)), torch.ones_like(local))
    counts.copy_(with_others[:-1])
