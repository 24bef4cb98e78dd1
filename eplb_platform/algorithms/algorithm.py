"""The interface that every algorithm is written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.slots import keep_slots
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology


class AlgorithmError(RuntimeError):
    """An algorithm that cannot be loaded, or that made an invalid map."""


class Algorithm(ABC):
    """A way to place experts: a pure function of arrays. No torch, no I/O, no clock, no state between calls.

    Found through the entry points `eplb_platform.algorithms`. The options of an algorithm are the
    keyword-only parameters of its constructor, which raises ValueError for a value out of range.
    """

    name: ClassVar[str]
    # Whether it keeps expert groups on nodes where `serving_ranks_by_node` says that it can be done.
    hierarchical: ClassVar[bool] = False

    @abstractmethod
    def place(
        self,
        load: NDArray[np.float64],
        *,
        num_physical_experts: int,
        topology: Topology,
        num_expert_groups: int,
        current: ExpertMap | None,
    ) -> NDArray[np.int32]:
        """The logical expert of each slot: int32 [layers, physical], -1 on inactive ranks.

        load: [windows, layers, logical] tokens, at least one window, finite and not negative.
        num_physical_experts: a multiple of the ranks, with room for every expert on the active ones.
        num_expert_groups: DeepSeek's groups of neighbouring experts; divides the logical experts.
        current: the map in use, of the same layers, experts and ranks; None where there is none.

        The caller has checked all that. It lets experts that stay on a rank keep their slots afterwards, so
        the order within a rank is free. Same input, same result, whatever the number of threads.
        """

    def weigh(
        self, load: NDArray[np.float64], compute_cost: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """The load that `place` gets and that its map is measured by; an algorithm that counts more than
        tokens makes it here.

        load: [windows, layers, logical] tokens; returned itself, or another of this shape
        compute_cost: [layers, logical], time of one token in any unit, NaN where an expert was not profiled;
            None without a profile. Raises ValueError where it is given and the algorithm has no use for it.
        """
        if compute_cost is not None:
            raise ValueError(f"algorithm {self.name!r} does not count compute cost, compute_aware does")
        return load

    def warm_up(self) -> None:
        """Compile what `place` and the choice of slots after it need, so that the first cycle does not wait
        for it. Called once at start; an algorithm with kernels of its own adds them.
        """
        topology = Topology(num_ranks=1)
        keep_slots(np.zeros((1, 1), dtype=np.int32), ExpertMap.initial(1, 1, topology))
