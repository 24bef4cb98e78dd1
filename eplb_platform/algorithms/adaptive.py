"""The adaptive algorithm: near-optimal balance for the windows to come, for as few moves as it takes.

It lowers the mean over windows of the hottest rank, not the hottest rank of their sum, at a price for every
move. Where there is a map in use it is repaired by swaps of replicas between ranks and by turning spare
replicas of cold experts into replicas of hot ones, and replaced where even that is too dear; where there is
none, DeepSeek's placement is polished by the same search. Experts move together in common directions (a
field of use that comes and goes), which plans ahead can use; what each does alone is damped as noise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from eplb_platform.algorithms.adaptive_problem import Floats, Ids, Problem, Slots, make_problem
from eplb_platform.algorithms.algorithm import Algorithm
from eplb_platform.algorithms.deepseek import DeepSeek, serving_ranks_by_node
from eplb_platform.algorithms.slots import keep_ranks
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

# A first placement is good enough this close to the hottest rank that is possible.
_TOLERANCE = 1e-4
# How many replicas the hottest experts get decides the balance; the first that ends this close is taken.
_DAMPINGS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4)
_GOOD_ENOUGH = 1e-3
# A placement that falls short is searched again from random changes, as often as this over its slots squared.
_SHAKES = 65536
_MOST_SHAKES = 400
# Starting anew is tried where repair leaves the hottest rank further off than this share of a whole move.
_HOPELESS = 0.5
# A thread is worth starting for this many slots.
_SLOTS_PER_THREAD = 2048


@dataclass(kw_only=True, eq=False)
class Adaptive(Algorithm):
    """Local search on the hottest rank over windows, at a price for each move.

    move_price: what moving every expert of a layer once may cost, in mean rank loads: a move must lower the
        hottest rank by at least move_price / slots of it. Less where noise asks for a smooth norm, which sees
        only part of a gain: an eighth at p = 32, where an even smoother one makes every move more of a bet.
    cross_node_factor: how much dearer a move is when no rank of the node has the expert
    max_moved_per_layer, max_moved_per_rank_pair (from one rank to another, in a layer), max_moved_per_cycle
        (over layers; those with the most gain for each move go first): hard limits on moved experts, none by
        default. Experts that have no replica on an active rank are placed all the same.
    rank_speed: tokens that each rank computes in some time, one above 0 for each; all alike by default
    num_threads: threads for layers, by default one for each core where that is worth it; same plan with any

    Hierarchical like DeepSeek's algorithm: where groups and nodes divide, groups keep to one node each.
    """

    name: ClassVar[str] = "adaptive"
    hierarchical: ClassVar[bool] = True

    move_price: float = 0.25
    cross_node_factor: float = 2.0
    max_moved_per_layer: int | None = None
    max_moved_per_rank_pair: int | None = None
    max_moved_per_cycle: int | None = None
    rank_speed: Sequence[float] | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        self.move_price = _number("move_price", self.move_price, 0)
        self.cross_node_factor = _number("cross_node_factor", self.cross_node_factor, 1)
        for name in ("max_moved_per_layer", "max_moved_per_rank_pair", "max_moved_per_cycle"):
            _check_limit(name, getattr(self, name), 0)
        _check_limit("num_threads", self.num_threads, 1)
        if self.rank_speed is not None:
            self.rank_speed = _speeds(self.rank_speed)

    def place(
        self,
        load: Floats,
        *,
        num_physical_experts: int,
        topology: Topology,
        num_expert_groups: int,
        current: ExpertMap | None,
    ) -> Slots:
        slots_per_rank = num_physical_experts // topology.num_ranks
        num_experts = load.shape[2]
        node_ranks = serving_ranks_by_node(topology, num_experts, num_expert_groups, slots_per_rank)
        if slots_per_rank > num_experts // len(node_ranks):
            # Every rank has room for every expert of its own: nothing to search for.
            return DeepSeek().place(
                load,
                num_physical_experts=num_physical_experts,
                topology=topology,
                num_expert_groups=num_expert_groups,
                current=current,
            )
        problem = make_problem(load, slots_per_rank, topology, num_expert_groups, node_ranks, self.rank_speed)
        if current is None:
            return problem.whole(self.construct(problem))
        placed = problem.whole(self._rearrange(problem, current))
        if current.topology == topology and current.num_physical_experts == num_physical_experts:
            stays = ~problem.has_load & (current.same_rank_replicas == 0)
            placed[stays] = current.physical_to_logical[stays]
        return placed

    def warm_up(self) -> None:
        super().warm_up()
        DeepSeek().warm_up()
        topology = Topology(num_ranks=4, num_nodes=2)
        current = ExpertMap.initial(1, 8, topology, 4)
        load = np.ones((8, 1, 8)) * np.arange(8)
        for windows in (load, load[:1]):
            for in_use in (None, current):
                for groups in (1, 2):
                    self.place(
                        windows,
                        num_physical_experts=12,
                        topology=topology,
                        num_expert_groups=groups,
                        current=in_use,
                    )

    def construct(self, problem: Problem) -> Slots:
        """[layers, active ranks, slots], a placement that owes nothing to another."""
        from eplb_platform.algorithms.adaptive_polish_kernels import polish_layers

        placed, zones_of = problem.greedy(1.0)
        if problem.load.shape[2] == 1:
            self._level(problem, placed, zones_of)

        def polish(layers: Ids) -> None:
            polish_layers(
                layers,
                problem.load,
                problem.weight,
                problem.squarings,
                problem.slowness,
                problem.zone,
                zones_of,
                _TOLERANCE,
                min(_SHAKES // problem.num_slots**2, _MOST_SHAKES),
                placed,
            )

        self.in_threads(polish, np.arange(problem.num_layers), problem.num_slots)
        return placed

    def _level(self, problem: Problem, placed: Slots, zones_of: Ids) -> None:
        """Level `placed` and, where that is not enough, placements with fewer replicas of the hottest; keep
        the best, in place. One window.
        """
        from eplb_platform.algorithms.adaptive_polish_kernels import level_layers

        layers, other = np.arange(problem.num_layers), placed
        above = np.full(problem.num_layers, np.inf)
        for damping in _DAMPINGS:
            if damping < 1:
                other = placed.copy()
                other[layers] = problem.of_layers(layers).greedy(damping)[0]

            def level(some: Ids, other: Slots = other) -> None:
                level_layers(
                    some,
                    problem.load,
                    problem.slowness,
                    problem.zone,
                    zones_of,
                    _TOLERANCE,
                    other,
                    placed,
                    above,
                )

            self.in_threads(level, layers, problem.num_slots)
            layers = layers[above[layers] > _GOOD_ENOUGH]
            if len(layers) == 0:
                return

    def _rearrange(self, problem: Problem, current: ExpertMap) -> Slots:
        search = _Search(self, problem, current)
        search.repair()
        search.start_anew()
        if self.max_moved_per_cycle is not None:
            search.spend(self.max_moved_per_cycle)
        return search.placed

    def in_threads(self, work: Callable[[Ids], None], layers: Ids, slots: int) -> None:
        """Do `work` on parts of `layers`; it runs without the interpreter lock and writes layers apart."""
        threads = min(
            self.num_threads or _cores(), len(layers), max(1, len(layers) * slots // _SLOTS_PER_THREAD)
        )
        if threads <= 1:
            work(layers)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, [layers[first::threads].copy() for first in range(threads)]):
                pass


class _Search:
    """The search from a map in use, layer by layer: placed [layers, active ranks, slots] is its answer."""

    def __init__(self, algorithm: Adaptive, problem: Problem, current: ExpertMap) -> None:
        self._algorithm = algorithm
        self._problem = problem
        self._current = current
        self._home = problem.slots_of(current.physical_to_logical)
        self._zones_of, self._has_zones = problem.zones_of(self._home)
        num_layers = problem.num_layers
        shape = (num_layers, len(problem.ranks), problem.slots_per_rank)
        self.placed = np.empty(shape, dtype=np.int32)
        self._cost = np.full(num_layers, np.inf)
        self._stay_cost = np.full(num_layers, np.inf)
        self._moved = np.zeros(num_layers, dtype=np.int64)
        self._limits = np.full(num_layers, _or_none(algorithm.max_moved_per_layer), dtype=np.int64)
        # Without load there is nothing to gain.
        self._limits[~problem.has_load] = 0

    def repair(self) -> None:
        """Repair every layer that keeps expert groups on their nodes, if that is asked for."""
        self._run(np.flatnonzero(self._has_zones), self._home, self._zones_of, from_start=False)

    def start_anew(self) -> None:
        """Where repair leaves much to gain, search from a new placement too, laid over the map in use; only
        from a new one where expert groups do not keep to their nodes yet.
        """
        algorithm = self._algorithm
        hopeless = self._cost > 1 + _HOPELESS * algorithm.move_price
        if algorithm.max_moved_per_layer is not None or algorithm.max_moved_per_rank_pair is not None:
            hopeless[:] = False
        layers = np.flatnonzero((hopeless & self._problem.has_load) | ~self._has_zones)
        if len(layers) == 0:
            return
        problem = self._problem.of_layers(layers)
        current = ExpertMap(
            self._current.physical_to_logical[layers], problem.num_experts, self._current.topology
        )
        anew = problem.whole(algorithm.construct(problem))
        kept = problem.slots_of(keep_ranks(anew, current, problem.node_ranks))
        start, zones_of = np.zeros_like(self.placed), self._zones_of.copy()
        start[layers] = kept
        zones_of[layers] = problem.zones_of(kept)[0]
        self._run(layers, start, zones_of, from_start=True)

    def spend(self, budget: int) -> None:
        """Keep the layers with the most gain for each move, as many as `budget` moves allow.

        Layers whose map in use cannot stay come first.
        """
        gain = self._stay_cost - self._cost
        for layer in np.argsort(-gain / np.maximum(self._moved, 1), kind="stable"):
            if self._moved[layer] > budget and np.isfinite(gain[layer]):
                self._limits[layer] = budget
                self._run(np.array([layer]), self._home, self._zones_of, from_start=False)
            budget = max(0, budget - int(self._moved[layer]))

    def _run(self, layers: Ids, start: Slots, zones_of: Ids, *, from_start: bool) -> None:
        from eplb_platform.algorithms.adaptive_repair_kernels import repair_layers

        problem, algorithm = self._problem, self._algorithm

        def repair(some: Ids) -> None:
            repair_layers(
                some,
                problem.load,
                problem.raw,
                problem.weight,
                problem.squarings,
                self._home,
                start,
                from_start,
                problem.slowness,
                problem.node,
                problem.zone,
                zones_of,
                algorithm.move_price,
                algorithm.cross_node_factor,
                self._limits,
                _or_none(algorithm.max_moved_per_rank_pair),
                self.placed,
                self._cost,
                self._moved,
                self._stay_cost,
            )

        algorithm.in_threads(repair, layers, problem.num_slots)


@dataclass(kw_only=True, eq=False)
class SwiftBalancer(Adaptive):
    """The movement-constrained setting: dearer moves, at most one expert from any rank to any other."""

    name: ClassVar[str] = "swift_balancer"

    move_price: float = 0.5
    max_moved_per_rank_pair: int | None = 1


@dataclass(kw_only=True, eq=False)
class FlashLB(Adaptive):
    """The multi-window setting: the best balance over the windows to come, with moves almost for nothing."""

    name: ClassVar[str] = "flashlb"

    move_price: float = 0.02
    cross_node_factor: float = 1.0


def _cores() -> int:
    """Cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(name: str, value: float, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number of at least {least}")
    return float(value)


def _check_limit(name: str, value: int | None, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}, or None")


def _speeds(values: Sequence[float]) -> tuple[float, ...]:
    if isinstance(values, str | int | float):
        raise ValueError(f"rank_speed is {values!r}, expected a value for each rank")
    speeds = tuple(_number("rank_speed", value, 0) for value in values)
    if not all(speeds):
        raise ValueError(f"rank_speed is {values!r}, expected values above 0")
    return speeds


def _or_none(limit: int | None) -> int:
    """`limit` for kernels, to which no limit is a very large one."""
    from eplb_platform.algorithms.adaptive_change_kernels import NO_LIMIT

    return NO_LIMIT if limit is None else limit
