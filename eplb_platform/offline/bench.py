"""Planning measured: algorithms and peers on the same loads, judged on load that they have not seen."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.algorithm import Algorithm
from eplb_platform.algorithms.discovery import (
    discover_algorithms,
    discover_peers,
    load_algorithm,
    make_algorithm,
)
from eplb_platform.algorithms.plan import DEFAULT_ALGORITHM, groups_kept, place_experts
from eplb_platform.balance import balancedness, lower_bound, moved_experts, rank_load, window_balancedness
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

Load = NDArray[np.float64]

# Left out unless named: blind to load, or without a profile of compute cost no other than the default.
_UNNAMED = ("random", "compute_aware", "compute_aware_hierarchical")


@dataclass(frozen=True)
class Shape:
    """What is planned for: EXPERTSxSLOTSxRANKS[xNODES[xGROUPS]]."""

    num_experts: int
    num_slots: int
    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Raises ValueError for what is no shape, or one that no map can have."""
        numbers = text.lower().split("x")
        if not 3 <= len(numbers) <= 5 or not all(n.isascii() and n.isdigit() and int(n) for n in numbers):
            raise ValueError(
                f"{text!r} is no shape, expected EXPERTSxSLOTSxRANKS[xNODES[xGROUPS]], as in 256x288x32x4x8"
            )
        shape = cls(*map(int, numbers))
        for wrong, reason in (
            (shape.num_slots % shape.num_ranks, "expected a multiple of ranks as slots"),
            (shape.num_slots < shape.num_experts, "expected at least as many slots as experts"),
            (shape.num_nodes > shape.num_ranks, "expected at most as many nodes as ranks"),
            (shape.num_experts % shape.num_groups, "expected a divisor of the experts as groups"),
        ):
            if wrong:
                raise ValueError(f"{text}: {reason}")
        return shape

    def __str__(self) -> str:
        numbers = [self.num_experts, self.num_slots, self.num_ranks, self.num_nodes, self.num_groups]
        while len(numbers) > 3 and numbers[-1] == 1:
            numbers.pop()
        return "x".join(map(str, numbers))

    @property
    def topology(self) -> Topology:
        return Topology(self.num_ranks, self.num_nodes)


@dataclass(frozen=True)
class Contender:
    """An algorithm or a peer; `reason` says why one that cannot run cannot."""

    name: str
    algorithm: Algorithm | None
    is_peer: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """One contender on one load and shape. Balancedness is mean / max rank load, of layers on average.

    cold, cold_above_bound: of the plan on the first collection, which owes nothing to another map: its
        balancedness there, and by which part its hottest ranks are above what is proven to be possible
    cold_ms: how long it takes
    in_window, above_bound, plan_ms: the same of the later plans, each of which starts from the one before
    moved: experts that ranks newly receive by one of them, of all layers; moved_share: of the slots
    next_forward: balancedness of each forward pass of the collection after the one planned on

    None where there are too few collections.
    """

    cold: float
    cold_above_bound: float
    cold_ms: float
    in_window: float | None
    above_bound: float | None
    plan_ms: float | None
    moved: float | None
    moved_share: float | None
    next_forward: float | None


@dataclass
class _Tally:
    """What the plans on one collection after the other came to."""

    algorithm: Algorithm
    shape: Shape
    reached: list[float]
    above: list[float]
    spent: list[float]
    moved: list[int]
    ahead: list[float]

    def add(self, placed: ExpertMap, windows: Load, milliseconds: float, current: ExpertMap | None) -> None:
        reached = window_balancedness(placed, windows)
        kept = groups_kept(self.algorithm, placed, self.shape.num_groups)
        bound = lower_bound(windows, self.shape.num_slots, self.shape.topology, kept)
        self.reached.append(float(reached.mean()))
        self.above.append(float((1 / (reached * bound)).mean()) - 1)
        self.spent.append(milliseconds)
        if current is not None:
            self.moved.append(int(moved_experts(current, placed).sum()))

    def result(self, num_layers: int) -> Result:
        moved = _mean(self.moved)
        return Result(
            cold=self.reached[0],
            cold_above_bound=self.above[0],
            cold_ms=self.spent[0],
            in_window=_mean(self.reached[1:]),
            above_bound=_mean(self.above[1:]),
            plan_ms=statistics.median(self.spent[1:]) if self.spent[1:] else None,
            moved=moved,
            moved_share=None if moved is None else moved / num_layers / self.shape.num_slots,
            next_forward=_mean(self.ahead),
        )


def measure(
    algorithm: Algorithm,
    collections: Sequence[Load],
    shape: Shape,
    *,
    num_windows: int = 40,
    repeats: int = 3,
) -> Result:
    """Plan on one collection after the other, and judge each plan on the next, which it has not seen.

    collections: [forwards, layers, logical] tokens each; a plan sees their forward passes summed into at
        most `num_windows`
    repeats: times that a plan is made, of which the median counts. It is processor time of this process, in
        which the algorithm should keep to one thread, for the map with experts kept in their slots.
    """
    tally, current = _Tally(algorithm, shape, [], [], [], [], []), None
    for index, collection in enumerate(collections):
        windows = summed(collection, num_windows)
        placed, milliseconds = _timed(algorithm, windows, shape, current, repeats)
        tally.add(placed, windows, milliseconds, current)
        for unseen in collections[index + 1 : index + 2]:
            tally.ahead.append(float(balancedness(rank_load(placed, unseen)).mean()))
        current = placed
    return tally.result(collections[0].shape[1])


def summed(collection: Load, num_windows: int) -> Load:
    """[windows, layers, logical], neighbouring forward passes added up; collection: [forwards, ...]."""
    pieces = np.array_split(collection, min(num_windows, len(collection)))
    return np.stack([piece.sum(axis=0) for piece in pieces])


def initial_balancedness(collections: Sequence[Load], shape: Shape) -> float:
    """Per forward pass of all collections, with the layout that engines start with."""
    initial = ExpertMap.initial(
        collections[0].shape[1], shape.num_experts, shape.topology, shape.num_slots - shape.num_experts
    )
    return statistics.mean(float(balancedness(rank_load(initial, each)).mean()) for each in collections)


def contenders(names: Sequence[str] | None = None) -> list[Contender]:
    """Algorithms by name, in one thread each, and after them every peer; by default all algorithms that plan
    by tokens.

    Raises ValueError for an unknown algorithm, AlgorithmError for one that fails to load.
    """
    found = [Contender(name, _single_threaded(name)) for name in names or _deterministic()]
    peers, failures = discover_peers()
    found += [Contender(name, peer(), is_peer=True) for name, peer in sorted(peers.items())]
    return found + [
        Contender(name, None, is_peer=True, reason=_why_not(failure))
        for name, failure in sorted(failures.items())
    ]


def _why_not(failure: BaseException) -> str:
    if isinstance(failure, ModuleNotFoundError):
        return f"not installed ({failure})"
    return f"cannot be loaded: {failure!r}"


def _deterministic() -> list[str]:
    """Those that plan by tokens, the default algorithm first."""
    names = [name for name in discover_algorithms() if name not in _UNNAMED]
    return sorted(names, key=lambda name: (name != DEFAULT_ALGORITHM, name))


def _single_threaded(name: str) -> Algorithm:
    options = inspect.signature(load_algorithm(name)).parameters
    return make_algorithm(name, {"num_threads": 1} if "num_threads" in options else {})


def _timed(
    algorithm: Algorithm, windows: Load, shape: Shape, current: ExpertMap | None, repeats: int
) -> tuple[ExpertMap, float]:
    """The map, and the median of the milliseconds that making it took."""
    spent = []
    for _ in range(repeats):
        started = time.process_time()
        placed = place_experts(
            algorithm,
            windows,
            num_physical_experts=shape.num_slots,
            topology=shape.topology,
            num_expert_groups=shape.num_groups,
            current=current,
        )
        spent.append((time.process_time() - started) * 1e3)
    return placed, statistics.median(spent)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None
