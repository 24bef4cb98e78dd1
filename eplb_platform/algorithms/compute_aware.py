"""Placement by what experts cost to compute, not by their tokens alone.

The blend is that of SGLang's proposal for compute-cost-aware balancing. Without a profile tokens alone count,
and with a part of one unprofiled experts count as ordinary ones, never as free.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_platform.algorithms.algorithm import Algorithm
from eplb_platform.algorithms.discovery import OptionValue, make_algorithm
from eplb_platform.algorithms.plan import DEFAULT_ALGORITHM, rebalance_experts
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology


class ComputeAware(Algorithm):
    """Another algorithm, working on tokens blended with what they cost; expert groups do not count.

    alpha: share of the cost in the blend: 0 tokens alone, 1 cost alone, as whoever hands over a cost expects
    engine: the algorithm that places
    engine_options: go to it

    Without a profile it plans by tokens.
    """

    name: ClassVar[str] = "compute_aware"
    hierarchical: ClassVar[bool] = False

    def __init__(
        self, *, alpha: float = 1.0, engine: str = DEFAULT_ALGORITHM, **engine_options: OptionValue
    ) -> None:
        self.alpha = _checked_alpha(alpha)
        if engine in (ComputeAware.name, ComputeAwareHierarchical.name):
            raise ValueError(f"engine is {engine!r}, expected an algorithm that is not compute-aware itself")
        self._engine = make_algorithm(engine, engine_options)

    def weigh(
        self, load: NDArray[np.float64], compute_cost: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        return load if compute_cost is None else blend(load, compute_cost, self.alpha)

    def place(
        self,
        load: NDArray[np.float64],
        *,
        num_physical_experts: int,
        topology: Topology,
        num_expert_groups: int,
        current: ExpertMap | None,
    ) -> NDArray[np.int32]:
        return self._engine.place(
            load,
            num_physical_experts=num_physical_experts,
            topology=topology,
            num_expert_groups=num_expert_groups if self.hierarchical else 1,
            current=current,
        )

    def warm_up(self) -> None:
        self._engine.warm_up()


class ComputeAwareHierarchical(ComputeAware):
    """The same, with all replicas of an expert group on one node where groups and nodes divide."""

    name: ClassVar[str] = "compute_aware_hierarchical"
    hierarchical: ClassVar[bool] = True


def blend(load: NDArray[np.float64], compute_cost: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """[windows, layers, logical], alpha * (cost, scaled to the layer's tokens) + (1 - alpha) * tokens.

    load: [windows, layers, logical], tokens
    compute_cost: [layers, logical], time of one token in any unit, as sum of times / sum of tokens; NaN for
        an expert without a profile, which costs what the profiled tokens of its layer cost on average
    alpha: 0 tokens alone, 1 cost alone

    The total of a layer over all windows is that of its tokens. A layer without any profile, or whose
    profiled experts cost nothing, stays as it is.
    """
    return load * cost_factors(load.sum(axis=0), compute_cost, alpha)


def cost_factors(tokens: ArrayLike, compute_cost: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """[layers, logical], what a token of each expert counts in the blend.

    tokens: [layers, logical], over all windows; compute_cost, alpha: as of `blend`
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    profiled = np.isfinite(compute_cost)
    known = np.where(profiled, compute_cost, 0.0)
    # Of profiled experts that have no tokens the plain mean: it is all that is known.
    weight = np.where(profiled, tokens, 0.0)
    weight = np.where(weight.any(axis=1, keepdims=True), weight, profiled)
    average = _ratio((known * weight).sum(axis=1, keepdims=True), weight.sum(axis=1, keepdims=True))
    cost = np.where(profiled, compute_cost, average)
    layer_cost = (tokens * cost).sum(axis=1, keepdims=True)
    scaled = cost * _ratio(tokens.sum(axis=1, keepdims=True), layer_cost)
    return np.where(layer_cost > 0, alpha * scaled + (1 - alpha), 1.0)


def compute_cost_aware_rebalance_experts(
    token_weight: ArrayLike,
    compute_cost_weight: ArrayLike | None,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    enable_hierarchical: bool,
    alpha: float = 0.5,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Plan by tokens and by what they cost, under the name and with the arguments of SGLang's documentation.

    token_weight: [layers, logical], tokens
    compute_cost_weight: [layers, logical], the time that these tokens took in any unit, not the time of one
        token; None without a profile. NaN, or 0 for an expert with tokens, means that it has none.
    num_replicas: physical experts, a multiple of num_gpus
    num_groups: expert groups; num_nodes: nodes; num_gpus: ranks
    enable_hierarchical: keep each expert group on one node where groups and nodes divide
    alpha: 0 tokens alone, 1 cost alone

    Returns the logical expert of each slot, int32 [layers, num_replicas]; the slots of each expert, int32
    [layers, logical, most replicas], -1 pads; and the replicas of each expert, int32 [layers, logical].
    Raises ValueError for what `rebalance_experts` refuses.
    """
    plan = rebalance_experts(
        token_weight,
        num_physical_experts=num_replicas,
        topology=Topology(num_gpus, num_nodes),
        num_expert_groups=num_groups,
        algorithm=(ComputeAwareHierarchical if enable_hierarchical else ComputeAware).name,
        compute_cost=None if compute_cost_weight is None else _per_token(token_weight, compute_cost_weight),
        alpha=alpha,
    )
    held = plan.expert_map
    return held.physical_to_logical, held.logical_to_physical, held.replica_count


def _per_token(tokens: ArrayLike, cost: ArrayLike) -> NDArray[np.float64]:
    """[layers, logical], cost of one token; NaN where it is not known: nothing computes in no time."""
    total, spent = np.asarray(tokens, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    if total.shape != spent.shape:
        raise ValueError(
            f"compute_cost_weight has shape {spent.shape}, expected {total.shape} as token_weight"
        )
    known = (total > 0) & (spent != 0)
    return np.asarray(np.divide(spent, total, out=np.full(total.shape, np.nan), where=known))


def _ratio(value: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.float64]:
    """value / by, 0 where `by` is."""
    return np.asarray(np.divide(value, by, out=np.zeros_like(value), where=by > 0))


def _checked_alpha(alpha: float) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}, expected a number from 0 to 1")
    return float(alpha)
