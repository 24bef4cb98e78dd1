"""From what the ranks measured to the numbers of the demo's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.balance import balancedness


@dataclass(frozen=True)
class PhaseLoad:
    """The rank load of a phase."""

    rank_load: NDArray[np.int64]
    """[forwards, layers, ranks]: tokens that each rank's experts worked on."""

    @property
    def balancedness(self) -> NDArray[np.float64]:
        """[forwards, layers], on the rank level."""
        return balancedness(self.rank_load)

    def mean_from(self, step: int) -> float:
        """Mean over the forward passes from `step` on of the mean over layers."""
        return float(self.balancedness[step:].mean())

    def mean_until(self, step: int) -> float:
        """The same over the forward passes before `step`; over all where there are none."""
        return float((self.balancedness[:step] if step else self.balancedness).mean())

    def worst_layer_from(self, step: int) -> float:
        """Mean over the forward passes from `step` on of the layer where that mean is lowest."""
        return float(self.balancedness[step:].mean(axis=0).min())


def load_by_rank(physical_load: NDArray[np.int32], num_ranks: int) -> NDArray[np.int64]:
    """Sum [..., physical] over each rank's slots: [..., ranks]. Slots of one rank are neighbours."""
    by_slot = physical_load.reshape(*physical_load.shape[:-1], num_ranks, -1)
    return np.asarray(by_slot.sum(axis=-1, dtype=np.int64))


def total_load(sent_by_rank: Sequence[NDArray[np.int64]]) -> PhaseLoad:
    """Add up what every rank sent: arrays [forwards, layers, ranks]."""
    return PhaseLoad(np.sum(np.stack(sent_by_rank), axis=0))
