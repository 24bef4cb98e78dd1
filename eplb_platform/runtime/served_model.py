"""What an integration hands to the balancer: the model's expert weights and its routing tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from eplb_platform.expert_map import ExpertMap

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from eplb_platform.backend import Backend
    from eplb_platform.runtime.compute_profiling import ComputeProfiling


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


class WeightedModel(ServedModel, Protocol):
    """A model whose routing tables may give the replicas of an expert unequal shares."""

    @property
    def routing_table_width(self) -> int:
        """Entries that a row of the device's table has room for, the same on every rank; the more, the finer
        the shares. An expert may get as many replicas as there are redundant slots, and one.
        """
        ...

    def apply_tables(
        self,
        layers: Sequence[int],
        expert_map: ExpertMap,
        logical_to_physical: NDArray[np.int32],
        count: NDArray[np.int32],
    ) -> None:
        """In place of `apply_map`: route the tokens of `layers` by these tables from the next pass on.

        logical_to_physical: [len(layers), logical, width], padded with -1; entries repeat
        count: [len(layers), logical], entries in use
        """
        ...


class MeasuredModel(ServedModel, Protocol):
    """A model that can time its experts."""

    def measure_with(self, profiling: ComputeProfiling, backend: Backend) -> None:
        """Give `profiling` the timers of a pass, and from now on time the experts whenever it has some in
        `current`.
        """
        ...


class NamedModel(ServedModel, Protocol):
    """A model that names what its layers keep for each expert: no balancer starts that would part it."""

    def layer_tensors(self, layer: int) -> Mapping[str, torch.Tensor | Sequence[torch.Tensor]]:
        """All that the layer keeps for the experts of this rank's slots, by name, moved or not.

        Copies that an engine derives (of scales in another type, say) are among them. Those in
        `expert_weights` are known by their memory. One entry for each slot in any other is refused, so that
        routers, counters and tensors that all experts share are to be left out.
        """
        ...
