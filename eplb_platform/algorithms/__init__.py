"""Algorithms: from expert load to the next expert map, behind one interface and found through stevedore."""

from __future__ import annotations

from eplb_platform.algorithms.algorithm import Algorithm, AlgorithmError
from eplb_platform.algorithms.compute_aware import compute_cost_aware_rebalance_experts
from eplb_platform.algorithms.discovery import discover_algorithms, load_algorithm
from eplb_platform.algorithms.plan import DEFAULT_ALGORITHM, Plan, rebalance_experts

__all__ = [
    "DEFAULT_ALGORITHM",
    "Algorithm",
    "AlgorithmError",
    "Plan",
    "compute_cost_aware_rebalance_experts",
    "discover_algorithms",
    "load_algorithm",
    "rebalance_experts",
]
