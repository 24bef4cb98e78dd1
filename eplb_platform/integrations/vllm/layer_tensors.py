"""What a MoE layer of vLLM keeps for each expert, moved by the balancer or not.

vLLM hands out the parameters of a layer. Its quantisation methods and kernels may keep more: weights in a
layout of their own, scales in another type, products of scales, made once while the weights were loaded. A
tensor that stays while its expert moves makes wrong tokens, without a word from anybody.

A tensor is an expert's for certain by its role, where the kernels are given it with the weights, and by
vLLM's names for weights (`w13`, `w2`). Where only its shape or its name hints at it, it is doubtful.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import torch

Tensors: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"

# Of all experts together, or of the router. vLLM's own list of what its balancer leaves alone has most.
_NOT_AN_EXPERTS = frozenset(
    {
        "e_score_correction_bias",
        "hash_indices_table",
        "w13_input_scale",
        "w2_input_scale",
        "_expert_map",
        "expert_mask",
        "expert_global_to_physical",
        "expert_physical_to_global",
        "expert_local_to_global",
    }
)
_OF_WEIGHTS = re.compile(r"_*(w13|w31|w1|w2|w3|g1|g2)(_|$)")
_COMPANION = re.compile(r"scale|zero|zp|bias|offset")
_ONE_BYTE = (torch.int8, torch.uint8, torch.bool)
_MAX_DEPTH = 3
"""Of the objects in which kernels wrap a tensor."""


class _Sign(IntEnum):
    """What says that a tensor is an expert's, beside its shape."""

    SHAPE_ONLY = 0
    COMPANION = 1
    WEIGHTS = 2
    ROLE = 3


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer that have one entry for each slot of this rank, by name."""

    moved: Mapping[str, torch.Tensor]
    left: Mapping[str, Tensors]
    """An expert's for certain, and not moved."""
    doubtful: Mapping[str, torch.Tensor]
    """Not moved, and perhaps an expert's."""

    @property
    def of_experts(self) -> dict[str, Tensors]:
        return {**self.moved, **self.left}


@dataclass(frozen=True)
class _Found:
    name: str
    tensors: Tensors
    sign: _Sign


@dataclass(frozen=True)
class _Span:
    """The memory of a tensor, from its first to behind its last byte."""

    device: torch.device
    start: int
    end: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Span:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return cls(tensor.device, start, start + (last + 1) * tensor.element_size())

    def __contains__(self, other: _Span) -> bool:
        return self.device == other.device and self.start <= other.start and other.end <= self.end


def tensors_of(layer: object, parameters: Sequence[torch.Tensor], slots: int) -> LayerTensors:
    """The tensors of one layer.

    layer: vLLM's `RoutedExperts`; parameters: those of it that are moved, [slots, ...] each; slots: physical
    experts on this rank
    """
    module = layer if isinstance(layer, torch.nn.Module) else None
    names = {} if module is None else {held.data_ptr(): name for name, held in module.named_parameters()}
    moved = {
        names.get(parameter.data_ptr(), f"expert_weights[{index}]"): parameter
        for index, parameter in enumerate(parameters)
    }
    left: dict[str, Tensors] = {}
    doubtful: dict[str, torch.Tensor] = {}
    known = [_Span.of(parameter) for parameter in moved.values()]
    sizes, counts = _sizes(layer), _expert_counts(layer)
    for found in sorted(_found(layer, slots), key=lambda each: -each.sign):
        if not _one_for_each_slot(found.tensors, slots) or _lies_in(found.tensors, known):
            continue
        if _is_certain(found, slots, sizes, counts):
            left[found.name] = found.tensors
        elif isinstance(found.tensors, torch.Tensor):
            if not _is_doubtful(found.tensors, found.sign, slots, sizes | counts):
                continue
            doubtful[found.name] = found.tensors
        known.extend(_Span.of(tensor) for tensor in _each(found.tensors))
    return LayerTensors(moved, left, doubtful)


def _is_certain(found: _Found, slots: int, sizes: set[int], counts: set[int]) -> bool:
    if found.sign is _Sign.ROLE:
        return True
    if found.sign is _Sign.WEIGHTS:
        return slots not in sizes
    return found.sign is _Sign.COMPANION and slots > 1 and slots not in sizes | counts


def _is_doubtful(tensor: torch.Tensor, sign: _Sign, slots: int, numbers: set[int]) -> bool:
    """Named like an expert's, or with values that differ between slots and a length that nothing explains."""
    if sign is not _Sign.SHAPE_ONLY:
        return slots > 1
    is_number = tensor.is_floating_point() or tensor.dtype in _ONE_BYTE
    return is_number and slots not in numbers and _rows_differ(tensor)


# --- where vLLM keeps tensors ---


def _found(layer: object, slots: int) -> Iterator[_Found]:
    if isinstance(layer, torch.nn.Module):
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            own_name = name.rpartition(".")[2]
            if own_name not in _NOT_AN_EXPERTS:
                yield _Found(name, tensor, max(_sign(own_name), _sign_of_companion(own_name)))
    yield from _attributes(layer, "", slots, companions=True)
    method = getattr(layer, "quant_method", None)
    while method is not None:
        yield from _attributes(method, "quant_method.", slots)
        yield from _quantisation(getattr(method, "moe_quant_config", None), slots)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if experts is not None:
            yield from _attributes(experts, "fused_experts.", slots)
            yield from _quantisation(getattr(experts, "quant_config", None), slots)
        method = getattr(method, "__dict__", {}).get("old_quant_method")


def _attributes(owner: object, prefix: str, slots: int, *, companions: bool = False) -> Iterator[_Found]:
    """The plain attributes of an object that are tensors, or that hold some under the name of a weight."""
    for name, value in getattr(owner, "__dict__", {}).items():
        if name in _NOT_AN_EXPERTS:
            continue
        sign = max(_sign(name), _sign_of_companion(name) if companions else _Sign.SHAPE_ONLY)
        if isinstance(value, torch.Tensor):
            yield _Found(prefix + name, value, sign)
        elif sign is not _Sign.SHAPE_ONLY:
            yield from _inside(value, prefix + name, sign, slots, _MAX_DEPTH)


def _quantisation(config: object, slots: int) -> Iterator[_Found]:
    """What the kernels are told of weights and activations (`FusedMoEQuantConfig`)."""
    for part, sign in (
        ("_w1", _Sign.ROLE),
        ("_w2", _Sign.ROLE),
        ("_a1", _Sign.SHAPE_ONLY),
        ("_a2", _Sign.SHAPE_ONLY),
    ):
        described = getattr(config, part, None)
        if described is not None:
            yield from _inside(described, f"moe_quant_config.{part}", sign, slots, _MAX_DEPTH + 1)


def _inside(value: object, name: str, sign: _Sign, slots: int, depth: int) -> Iterator[_Found]:
    """Tensors in lists, in dicts and in the objects of kernels; a list with one for each slot is one."""
    if isinstance(value, torch.Tensor):
        yield _Found(name, value, sign)
    elif depth > 0 and not isinstance(value, type | torch.nn.Module):
        if isinstance(value, list | tuple):
            if len(value) == slots and all(isinstance(each, torch.Tensor) for each in value):
                yield _Found(name, value, sign)
                return
            parts = [(f"{name}[{index}]", each) for index, each in enumerate(value)]
        else:
            held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
            parts = [(f"{name}.{key}", each) for key, each in held.items()]
        for part, each in parts:
            yield from _inside(each, part, sign, slots, depth - 1)


def _sign(name: str) -> _Sign:
    return _Sign.WEIGHTS if _OF_WEIGHTS.match(name) else _Sign.SHAPE_ONLY


def _sign_of_companion(name: str) -> _Sign:
    return _Sign.COMPANION if _COMPANION.search(name) else _Sign.SHAPE_ONLY


# --- shapes, memory, values ---


def _sizes(layer: object) -> set[int]:
    """Dimensions of the layer's weights: a tensor of such a length need not be the experts'."""
    config = getattr(layer, "moe_config", None)
    held = [
        getattr(layer, "hidden_size", None),
        getattr(layer, "intermediate_size_per_partition", None),
        getattr(config, "hidden_dim", None),
        getattr(config, "hidden_dim_unpadded", None),
        getattr(config, "intermediate_size_per_partition", None),
    ]
    sizes = {size for size in held if isinstance(size, int)}
    return sizes | {2 * size for size in sizes}


def _expert_counts(layer: object) -> set[int]:
    """Of the whole group: what a router keeps has such a length."""
    config = getattr(layer, "moe_config", None)
    held = [
        getattr(layer, "global_num_experts", None),
        getattr(config, "num_experts", None),
        getattr(config, "num_logical_experts", None),
    ]
    return {count for count in held if isinstance(count, int)}


def _one_for_each_slot(tensors: Tensors, slots: int) -> bool:
    """A tensor that is expanded over the slots is one for all; one without memory of its own is none."""
    if not all(each.layout is torch.strided and not each.is_meta for each in _each(tensors)):
        return False
    if isinstance(tensors, torch.Tensor):
        has_rows = tensors.dim() > 0 and tensors.shape[0] == slots and tensors.numel() > 0
        return has_rows and (slots == 1 or tensors.stride(0) != 0)
    return len(tensors) == slots


def _each(tensors: Tensors) -> Sequence[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


def _lies_in(tensors: Tensors, spans: Sequence[_Span]) -> bool:
    """Whether the memory is that of tensors known already, of which this is another view."""
    return all(any(_Span.of(tensor) in span for span in spans) for tensor in _each(tensors))


def _rows_differ(tensor: torch.Tensor) -> bool:
    if tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)  # torch cannot compare pairs of 4-bit floats
    return any(not torch.equal(tensor[0], row) for row in tensor[1:])
