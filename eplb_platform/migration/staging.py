"""Memory that holds the experts that arrive, until every rank is ready to use them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

    from eplb_platform.backend import Backend

Parameter: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"
"""One parameter of one layer's experts on this rank: stacked [slots, ...], or one tensor per slot."""

ExpertWeights: TypeAlias = "Sequence[Sequence[Parameter]]"
"""[layer][parameter]"""

BYTES_PER_MB = 1_000_000
"""The unit of `staging_memory_mb`."""


class StagingError(ValueError):
    """The staging cannot hold one expert, or the experts do not have one shape."""


class Staging:
    """Room for `slots` experts, allocated at start and never grown.

    max_bytes: most memory to use, rounded down to whole experts; None, or more than one chunk can need, gives
    what `layers_per_chunk` layers need at most: every slot of every such layer.
    """

    def __init__(
        self, backend: Backend, expert_weights: ExpertWeights, *, max_bytes: int | None, layers_per_chunk: int
    ) -> None:
        slots_per_rank = _check_weights(expert_weights)
        self.expert_bytes = sum(_slot_bytes(parameter) for parameter in expert_weights[0])
        """Bytes of one expert, all parameters."""
        self.slots = min(layers_per_chunk, len(expert_weights)) * slots_per_rank
        """Experts that fit."""
        if max_bytes is not None:
            self.slots = min(self.slots, max_bytes // self.expert_bytes)
        if self.slots < 1:
            raise StagingError(_too_small(max_bytes, self.expert_bytes, len(expert_weights[0])))
        self.buffers = tuple(
            backend.allocate_staging(parameter, self.slots) for parameter in expert_weights[0]
        )
        """[parameter][row]: the tensor of the expert staged in a row."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, including what the backend's weight format pads."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor.untyped_storage() for rows in self.buffers for tensor in rows)
        }
        return sum(storages.values())

    def __str__(self) -> str:
        size = f"{self.nbytes / BYTES_PER_MB:.1f} MB"
        return f"staging for {self.slots} experts of {self.expert_bytes:,} bytes: {size}"


def _too_small(max_bytes: int | None, expert_bytes: int, num_parameters: int) -> str:
    given = (max_bytes or 0) / BYTES_PER_MB
    return (
        f"staging_memory_mb={given:g} does not hold one expert ({expert_bytes:,} bytes in "
        f"{num_parameters} parameters): give at least {math.ceil(expert_bytes / BYTES_PER_MB)}, "
        "or leave it out for what one chunk needs"
    )


def _slot_bytes(parameter: Parameter) -> int:
    """Bytes of one slot's tensor."""
    return parameter[0].numel() * parameter[0].element_size()


def _check_weights(expert_weights: ExpertWeights) -> int:
    """The slots per rank; every layer must have the same parameters, shapes and types."""
    if not expert_weights or not expert_weights[0]:
        raise StagingError(
            f"there are no expert weights: {len(expert_weights)} layers, or no parameter in layer 0"
        )
    slots_per_rank = len(expert_weights[0][0])
    if slots_per_rank == 0:
        raise StagingError("layer 0, parameter 0 has no slots: this rank holds no expert")
    expected = [_signature(parameter[0]) for parameter in expert_weights[0]]
    for layer, parameters in enumerate(expert_weights):
        if len(parameters) != len(expected):
            raise StagingError(
                f"layer {layer} has {len(parameters)} expert parameters, layer 0 has {len(expected)}"
            )
        for index, parameter in enumerate(parameters):
            _check_parameter(parameter, slots_per_rank, expected[index], f"layer {layer}, parameter {index}")
    return slots_per_rank


def _check_parameter(parameter: Parameter, slots_per_rank: int, expected: str, where: str) -> None:
    if len(parameter) != slots_per_rank:
        raise StagingError(f"{where} has {len(parameter)} slots, but {slots_per_rank} in layer 0")
    is_stacked = hasattr(parameter, "untyped_storage")  # not isinstance: torch is not imported for this
    found = {_signature(tensor) for tensor in ([parameter[0]] if is_stacked else parameter)}
    if found != {expected}:
        raise StagingError(f"{where} is {', '.join(sorted(found))} per expert, but {expected} in layer 0")


def _signature(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
