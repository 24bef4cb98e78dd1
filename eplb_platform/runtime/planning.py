"""The planner: an algorithm, what the configuration asks of its plans, and a limit on its time."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms import Plan, load_algorithm, rebalance_experts
from eplb_platform.algorithms.survival import Survival, check_survival, survives
from eplb_platform.algorithms.survival import warm_up as warm_up_survival
from eplb_platform.balance import window_balancedness
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime.ports import ExpertLoad

logger = logging.getLogger(__name__)


class PlannerTimeout(RuntimeError):
    """The algorithm did not answer in time; it is left behind in its thread and its answer is not used."""


class LoadHistory:
    """The windows of all cycles so far, at most `capacity`: when full, neighbours are added together."""

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._windows: ExpertLoad | None = None

    def add(self, windows: ExpertLoad) -> ExpertLoad:
        """Append [windows, layers, logical] and return what is kept: the same, oldest first."""
        kept = windows if self._windows is None else np.concatenate([self._windows, windows])
        while len(kept) > self._capacity:
            odd = kept[len(kept) - len(kept) % 2 :]
            kept = np.concatenate([kept[:-1:2] + kept[1::2], odd])
        self._windows = kept
        return kept


@dataclass(frozen=True)
class AlgorithmPlanner:
    """Plans with one algorithm, in a thread of its own that is given up when it takes longer than
    `timeout_s`.

    A layer stays as it is where its balancedness is `min_balancedness` or better, where the plan does not
    raise it, and where the plan would move more than `max_moved_experts_per_layer` experts. Whatever the
    balancedness, a layer moves that does not `survive` what it is to.
    """

    algorithm: str
    num_expert_groups: int
    timeout_s: float
    min_balancedness: float = 1.0
    max_moved_experts_per_layer: int | None = None
    survive: Survival = "none"
    history: LoadHistory | None = None
    """Given where the map is only recorded, to be deployed later: the plan is made from nothing, on the load
    of all cycles, since a fresh start moves nothing and serves all of it."""

    def warm_up(self) -> None:
        """Compile what the algorithm compiles, so that the first plan does not wait for it."""
        load_algorithm(self.algorithm)().warm_up()
        if self.survive != "none":
            warm_up_survival()

    async def plan(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        """load: [windows, layers, logical], tokens, perhaps weighed. Returns `current` itself where
        nothing is to move.
        """
        answers: list[ExpertMap | Exception] = []
        thread = threading.Thread(
            target=self._answer, args=(load, current, answers), name="eplb-planner", daemon=True
        )
        thread.start()
        thread.join(self.timeout_s)
        if not answers:
            raise PlannerTimeout(f"algorithm {self.algorithm!r} gave no plan within {self.timeout_s:g} s")
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def _answer(self, load: ExpertLoad, current: ExpertMap, answers: list[ExpertMap | Exception]) -> None:
        try:
            answers.append(self.choose(load, current))
        except Exception as error:
            answers.append(error)

    def choose(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        """The map to move to, without a limit on time; arguments as of `plan`."""
        if self.history is not None:
            load = self.history.add(load)
        plan = rebalance_experts(
            load,
            num_physical_experts=current.num_physical_experts,
            topology=current.topology,
            num_expert_groups=self.num_expert_groups,
            current=None if self.history is not None else current,
            algorithm=self.algorithm,
            survive=self._survival(current),
        )
        layers = self._worth_moving(plan, window_balancedness(current, load), current)
        return current.replace_layers(layers.tolist(), plan.expert_map) if layers.size else current

    def _survival(self, current: ExpertMap) -> Survival:
        """What the active ranks have slots for: fewer of them may not survive the loss of another one."""
        try:
            check_survival(
                self.survive, current.num_logical_experts, current.num_physical_experts, current.topology
            )
        except ValueError as error:
            logger.warning("planning without it: %s", error)
            return "none"
        return self.survive

    def _worth_moving(
        self, plan: Plan, balancedness: NDArray[np.float64], current: ExpertMap
    ) -> NDArray[np.intp]:
        gains = (plan.balancedness > balancedness) & (balancedness < self.min_balancedness)
        gains |= ~survives(current, self.survive) & survives(plan.expert_map, self.survive)
        gains &= survives(plan.expert_map, self.survive) | ~survives(current, self.survive)
        if self.max_moved_experts_per_layer is not None and self.history is None:
            gains &= plan.moved_experts <= self.max_moved_experts_per_layer
        return np.flatnonzero(gains)
