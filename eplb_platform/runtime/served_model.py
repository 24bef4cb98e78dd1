"""What an integration hands to the balancer: the model's expert weights and its routing tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from eplb_platform.expert_map import ExpertMap

if TYPE_CHECKING:
    import torch


class ServedModel(Protocol):
    """One model as one rank serves it.

    `model_name`, `num_experts_per_token` and `first_moe_layer` may be there besides; they are written into
    load traces.
    """

    @property
    def expert_weights(self) -> Sequence[Sequence[torch.Tensor | Sequence[torch.Tensor]]]:
        """[layer][parameter]: a stacked tensor [slots, ...] or one tensor per slot, of this rank.

        Everything that belongs to an expert, scales included, in the same order and shapes in every layer.
        """
        ...

    @property
    def expert_map(self) -> ExpertMap:
        """The placement that the weights follow when the balancer starts."""
        ...

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None:
        """Route the tokens of `layers` by `expert_map` from the next forward pass on.

        Forward thread, between two passes, right after the weights were swapped; updates tables in place.
        """
        ...
