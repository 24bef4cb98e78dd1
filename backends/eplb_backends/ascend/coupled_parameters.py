"""The parameters of an expert move together or not at all: a weight without its scale is a wrong weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

_QUANTISED = (torch.int8, torch.uint8, torch.int32)
"""What W8A8 and W4A8 keep weights in; int32 holds eight weights of four bits."""


def check_moved_together(
    layer: Mapping[str, Sequence[torch.Tensor] | torch.Tensor], moved: Sequence[str], *, slots: int
) -> None:
    """Raise `ValueError` unless the moved tensors of a layer are all that belong to its experts.

    layer: the layer's tensors by name, those that no expert owns too; a tensor belongs to the experts when
        its first dimension, or the length of the list, is `slots`
    moved: names of those that the balancer moves
    slots: physical experts on this rank
    """
    unknown = [name for name in moved if name not in layer]
    if unknown:
        raise ValueError(f"the layer has no {', '.join(unknown)}; it has {', '.join(layer)}")
    of_experts = [name for name, tensors in layer.items() if _has_one_each(tensors, slots)]
    foreign = [name for name in moved if name not in of_experts]
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: not one tensor for each of {slots} experts")
    left = [name for name in of_experts if name not in moved]
    if left and moved:
        raise ValueError(
            f"{', '.join(left)} would stay where they are while {', '.join(moved)} move: an expert's "
            "weights, scales and offsets move together"
        )
    bare = [name for name in moved if _is_quantised(name, layer[name]) and not _has_scale(name, moved)]
    if bare:
        raise ValueError(f"{', '.join(bare)}: quantised, and no scale moves with it")


def _has_one_each(tensors: Sequence[torch.Tensor] | torch.Tensor, slots: int) -> bool:
    if isinstance(tensors, torch.Tensor):
        return tensors.dim() > 0 and tensors.shape[0] == slots
    return len(tensors) == slots


def _is_quantised(name: str, tensors: Sequence[torch.Tensor] | torch.Tensor) -> bool:
    is_companion = any(word in name for word in ("scale", "offset", "bias"))
    return not is_companion and tensors[0].dtype in _QUANTISED


def _has_scale(name: str, moved: Sequence[str]) -> bool:
    """As `w13_weight_scale` is of `w13_weight_list`: they share the part before the first underscore."""
    stem = name.partition("_")[0]
    return any("scale" in other and other.partition("_")[0] == stem for other in moved if other != name)
