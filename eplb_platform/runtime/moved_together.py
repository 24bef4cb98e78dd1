"""Whether all that belongs to an expert moves with it: a weight without its scale is a wrong weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from eplb_platform.runtime.served_model import NamedModel, ServedModel

if TYPE_CHECKING:
    import torch

    from eplb_platform.backend import Backend

_Tensors: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"


def check_moved_together(model: ServedModel, backend: Backend) -> None:
    """Raise ValueError where a tensor that a layer keeps for its experts would stay while they move.

    Only models that name their tensors (`NamedModel`) can be asked. The backend is asked besides for what
    its device couples.
    """
    if not hasattr(model, "layer_tensors"):
        return
    named = cast(NamedModel, model)
    slots = named.expert_map.slots_per_rank
    for layer, parameters in enumerate(named.expert_weights):
        tensors = named.layer_tensors(layer)
        moved = _moved(tensors, parameters)
        try:
            _check_all_named(tensors, moved, parameters)
            _check_none_stays(tensors, moved, slots)
            backend.check_moved_together(tensors, moved, slots=slots)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error


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
