"""Experts that truly cost more: some do every matrix product several times, and so answer the same later.

They stand for experts of another size, number format or kernel. How often an expert computes is one of its
weights here, and moves with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_platform.integrations.transformers import ExpertParallelModel, ExpertParallelMoe

if TYPE_CHECKING:
    from eplb_platform.integrations.transformers import ExchangePlan


class RepeatingMoe(ExpertParallelMoe):
    """A MoE layer whose experts do each of their matrix products `repeats[slot]` times."""

    repeats: torch.Tensor
    """[slots, 1]"""
    _times: list[int]

    @property
    def expert_weights(self) -> list[torch.Tensor]:
        return [*super().expert_weights, self.repeats]

    def serve(self, rows: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
        self._times = self.repeats.flatten().int().tolist()
        return super().serve(rows, plan)

    def multiply(self, slot: int, rows: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> None:
        for _ in range(self._times[slot]):
            super().multiply(slot, rows, weight, output)


def give_repeats(model: ExpertParallelModel, repeats: NDArray[np.int64]) -> None:
    """Say how often each expert computes; repeats: [layers, logical]. Its layers are `RepeatingMoe`."""
    slots = model.expert_map.by_rank()[:, model.rank]
    for layer, block in enumerate(model.blocks):
        if not isinstance(block, RepeatingMoe):
            raise TypeError(f"layer {layer} is {type(block).__name__}, expected RepeatingMoe")
        times = np.where(slots[layer] >= 0, repeats[layer, slots[layer]], 1)
        block.repeats = torch.from_numpy(times[:, None].astype(np.float32)).to(block.gate_up.device)
