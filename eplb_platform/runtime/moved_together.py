"""Whether all that belongs to an expert moves with it: a weight without its scale is a wrong weight."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from eplb_platform.runtime.served_model import NamedModel, ServedModel

if TYPE_CHECKING:
    import torch

    from eplb_platform.backend import Backend

logger = logging.getLogger(__name__)

KEY = "check_expert_tensors"

_Tensors: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"


def check_moved_together(model: ServedModel, backend: Backend, *, refuse: bool = True) -> None:
    """Raise ValueError where a tensor that a layer keeps for its experts would stay while they move.

    Only models that name their tensors (`NamedModel`) can be asked. The backend is asked besides for what
    its device couples. What cannot be looked at is no finding: a warning names it.
    refuse: False for a warning in place of the error
    """
    if not hasattr(model, "layer_tensors"):
        return
    named = cast(NamedModel, model)
    faults: list[str] = []
    unknown: list[str] = []
    for layer, parameters in enumerate(named.expert_weights):
        try:
            fault = _fault(named, layer, parameters, backend)
        except Exception as error:  # an engine's objects are its own, and may do anything when looked at
            unknown.append(f"layer {layer}: {type(error).__name__}: {error}")
            continue
        if fault is not None and refuse:
            raise ValueError(f"layer {layer}: {fault} (eplb_config.{KEY} false: a warning only)")
        if fault is not None:
            faults.append(f"layer {layer}: {fault}")
    if faults:
        logger.warning("%s; served all the same: eplb_config.%s is false", _of_layers(faults), KEY)
    if unknown:
        logger.warning("%s: not known whether all that belongs to an expert moves", _of_layers(unknown))


def _of_layers(found: Sequence[str]) -> str:
    return found[0] if len(found) == 1 else f"{found[0]} (and so on, {len(found)} layers)"


def _fault(named: NamedModel, layer: int, parameters: Sequence[_Tensors], backend: Backend) -> str | None:
    slots = named.expert_map.slots_per_rank
    tensors = named.layer_tensors(layer)
    moved = _moved(tensors, parameters)
    try:
        _check_all_named(tensors, moved, parameters)
        _check_none_stays(tensors, moved, slots)
        backend.check_moved_together(tensors, moved, slots=slots)
    except ValueError as error:
        return str(error)
    return None


def _moved(tensors: Mapping[str, _Tensors], parameters: Sequence[_Tensors]) -> list[str]:
    """The names of those that are in `expert_weights`, known by their memory."""
    addresses = {_address(parameter) for parameter in parameters}
    return [name for name, tensor in tensors.items() if len(tensor) and _address(tensor) in addresses]


def _check_all_named(
    tensors: Mapping[str, _Tensors], moved: Sequence[str], parameters: Sequence[_Tensors]
) -> None:
    """Several parameters may be views of the same memory under one name."""
    addresses = {_address(tensors[name]) for name in moved}
    named = sum(_address(parameter) in addresses for parameter in parameters)
    if named < len(parameters):
        raise ValueError(
            f"{len(parameters)} parameters are in expert_weights, and "
            f"{named} of them in layer_tensors ({', '.join(moved) or 'none'})"
        )


def _address(tensors: _Tensors) -> int:
    return tensors[0].data_ptr()


def _check_none_stays(tensors: Mapping[str, _Tensors], moved: Sequence[str], slots: int) -> None:
    left = [name for name, tensor in tensors.items() if name not in moved and len(tensor) == slots]
    if left:
        raise ValueError(
            f"{', '.join(left)} would stay where they are while {', '.join(moved) or 'no others'} move: "
            "all that belongs to an expert moves together, or its tokens are wrong"
        )
