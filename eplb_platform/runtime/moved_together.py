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
            _check_all_named(moved, parameters)
            _check_none_stays(tensors, moved, slots)
            backend.check_moved_together(tensors, moved, slots=slots)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error


def _moved(tensors: Mapping[str, _Tensors], parameters: Sequence[_Tensors]) -> list[str]:
    """The names of those that are in `expert_weights`, known by their memory."""
    addresses = {parameter[0].data_ptr() for parameter in parameters}
    return [name for name, tensor in tensors.items() if len(tensor) and tensor[0].data_ptr() in addresses]


def _check_all_named(moved: Sequence[str], parameters: Sequence[_Tensors]) -> None:
    if len(moved) < len(parameters):
        raise ValueError(
            f"{len(parameters)} parameters are in expert_weights, and "
            f"{len(moved)} of them in layer_tensors ({', '.join(moved) or 'none'})"
        )


def _check_none_stays(tensors: Mapping[str, _Tensors], moved: Sequence[str], slots: int) -> None:
    left = [name for name, tensor in tensors.items() if name not in moved and len(tensor) == slots]
    if left:
        raise ValueError(
            f"{', '.join(left)} would stay where they are while {', '.join(moved) or 'no others'} move: "
            "all that belongs to an expert moves together, or its tokens are wrong"
        )
