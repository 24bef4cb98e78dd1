"""A simulated cluster: the real balancer on many ranks in one process, with every fault that a seed draws.

    from eplb_platform.testing.cluster import simulate
    result = simulate(123)
    result.violations, result.injected, result.recovered, result.longest_wait_steps

One thread runs everything: the forward and the background thread of each rank are coroutines over simulated
ports, and a seed decides what happens when. What is real: the balancer, its cycle, agreement, gate and
meetings, the deployment, schedules and their execution, and the collection of load. What is simulated: time,
the store and the way to it, the group, the weights (tags), the planner unless a scenario asks for the
configured one, and the engine.
"""

from __future__ import annotations

from eplb_platform.testing.cluster.campaign import Tally, run_seeds
from eplb_platform.testing.cluster.scenario import FaultPlan, Scenario, draw_scenario
from eplb_platform.testing.cluster.simulation import Result, simulate

__all__ = ["FaultPlan", "Result", "Scenario", "Tally", "draw_scenario", "run_seeds", "simulate"]
