"""What to deploy for recorded load: EP size, redundant experts, hierarchical or global, static or dynamic.

Plans are made on the first half of the steps and judged on the second. The coarse search judges static maps
on some of these steps; whether to balance while serving, and how often, is then simulated for the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms import DEFAULT_ALGORITHM, load_algorithm, rebalance_experts
from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.offline.hardware import HardwareProfile
from eplb_platform.offline.serving import Balanced, FixedMap, Setting
from eplb_platform.offline.simulate import Result, replay
from eplb_platform.offline.step_time import StepTime, rank_work
from eplb_platform.records.load_trace import LoadTrace, release_pages
from eplb_platform.topology import Topology

NUM_WINDOWS = 16
JUDGED_STEPS = 48
"""Of the second half, evenly spaced, in the coarse search."""
SIMULATED_STEPS = 1500
"""At most, of the second half, to choose between static and dynamic."""
JUDGED_LAYERS = 16
"""At most, evenly spaced, in the coarse search; the others are taken to be like these."""
INTERVALS = (100, 300, 600, 1500, 3000)
EP_SIZES = tuple(2**power for power in range(2, 11))
MOST_EP_SIZES = 4
FURTHER_SLOTS = (0, 1, 2, 4, 8)
"""Slots of a rank beyond the fewest that hold all experts."""
WORTH = 0.01
"""A gain below this part is worth neither memory nor movement."""
_STEPS_AT_ONCE = 64
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """What is asked for.

    memory_gb: of a rank, for the experts' weights of all layers and the staging for one of them
    ep_sizes: to choose from; by default the smallest powers of two whose experts fit
    num_expert_groups: of the model's router; 1 for none
    for_latency: choose by step time instead of by tokens per second and rank
    """

    profile: HardwareProfile
    memory_gb: float
    ep_sizes: Sequence[int] = ()
    num_expert_groups: int = 1
    algorithm: str = DEFAULT_ALGORITHM
    for_latency: bool = False


@dataclass(frozen=True, eq=False)
class Choice:
    """One static deployment, judged on steps that it was not planned on.

    memory_gb: of a rank, as in `Question`. step_s: mean of the judged steps. tokens_per_s: for each rank.
    on_front: no other choice has less memory, is better balanced and has a shorter step
    """

    topology: Topology
    redundant_experts: int
    slots_per_rank: int
    is_hierarchical: bool
    memory_gb: float
    balancedness: float
    step_s: float
    tokens_per_s: float
    on_front: bool = False

    def beats(self, other: Choice) -> bool:
        """Whether it is nowhere worse in memory, balance and step time, and somewhere better."""
        mine, theirs = ((each.memory_gb, -each.balancedness, each.step_s) for each in (self, other))
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True, eq=False)
class Advice:
    """What to deploy, and why.

    choices: all that were tried, by memory
    chosen: of them; without: the same ranks without further redundant experts
    static, dynamic: the chosen one simulated with its map and with balancing, by collection interval
    interval: of the dynamic deployment that is advised, None for a static one
    """

    question: Question
    choices: Sequence[Choice]
    chosen: Choice
    without: Choice
    other_placement: Choice | None
    static: Result
    dynamic: dict[int, Result]
    interval: int | None
    num_planned_steps: int
    num_simulated_steps: int

    @property
    def gain_of_balancing(self) -> float:
        """Throughput of the best dynamic deployment over the static one, as a part; 0 without any."""
        best = max((result.throughput for result in self.dynamic.values()), default=self.static.throughput)
        return best / self.static.throughput - 1

    def reasons(self) -> list[str]:
        """Why, in words."""
        return [
            self._why_ranks(),
            self._why_redundant(),
            *self._why_placement(),
            self._why_static_or_dynamic(),
        ]

    def eplb_config(self, map_path: str = "map.json") -> dict[str, object]:
        """The keys of eplb_config that deploy the advice; a static map is in the file at `map_path`."""
        if self.interval is None:
            return {"expert_map_path": map_path}
        return {
            "dynamic_eplb": True,
            "num_redundant_experts": self.chosen.redundant_experts,
            "expert_heat_collection_interval": self.interval,
            "algorithm_execution_interval": execution_interval(self.interval),
            "eplb_policy_type": self.question.algorithm,
        }

    def _why_ranks(self) -> str:
        chosen = self.chosen
        aim = "shortest step" if self.question.for_latency else "most tokens/s of a rank"
        sizes = sorted({choice.topology.num_ranks for choice in self.choices})
        ranks = chosen.topology.num_ranks
        if len(sizes) == 1:
            return f"EP size {ranks}: the only one in question."
        return (
            f"EP size {ranks}: the {aim} of {', '.join(map(str, sizes))}, at {chosen.step_s * 1e3:.2f} ms "
            f"a step and {chosen.tokens_per_s:,.0f} tokens/s of each rank."
            f"{'' if chosen.on_front else self._why_not_on_front()}"
        )

    def _why_not_on_front(self) -> str:
        chosen = self.chosen
        other = next(choice for choice in self.choices if choice.on_front and choice.beats(chosen))
        return (
            f" Others beat it in memory, balance and step time, as EP size {other.topology.num_ranks} with "
            f"{other.redundant_experts} redundant experts, which has {other.tokens_per_s:,.0f} tokens/s of "
            "each rank."
        )

    def _why_redundant(self) -> str:
        chosen, without = self.chosen, self.without
        if chosen is without:
            return (
                f"{chosen.redundant_experts} redundant experts: further ones would gain less than "
                f"{WORTH:.0%}, or do not fit in {self.question.memory_gb:g} GB."
            )
        return (
            f"{chosen.redundant_experts} redundant experts: balancedness {chosen.balancedness:.3f} against "
            f"{without.balancedness:.3f} with {without.redundant_experts}, and a step of "
            f"{chosen.step_s * 1e3:.2f} ms against {without.step_s * 1e3:.2f} ms, for "
            f"{chosen.memory_gb - without.memory_gb:.1f} GB more on each rank; still more of them gain less "
            f"than {WORTH:.0%} or do not fit."
        )

    def _why_placement(self) -> Iterable[str]:
        other = self.other_placement
        if other is None:
            return
        name = "hierarchical" if self.chosen.is_hierarchical else "global"
        reason = (
            f"costs less than {WORTH:.0%} and keeps the router's groups on a node, whose saved traffic is "
            "not in the estimate"
            if self.chosen.is_hierarchical
            else "keeping expert groups on a node costs more than that traffic is assumed to be worth"
        )
        yield (
            f"{name.capitalize()} placement: {reason} (step {self.chosen.step_s * 1e3:.2f} ms, the other way "
            f"{other.step_s * 1e3:.2f} ms)."
        )

    def _why_static_or_dynamic(self) -> str:
        gain = self.gain_of_balancing
        if not self.dynamic:
            return f"Static: {self.num_simulated_steps} steps are too few to simulate balancing on."
        if not any(result.cycles for result in self.dynamic.values()):
            return (
                f"Static: the {self.num_simulated_steps} steps that balancing was simulated on take "
                f"{self.static.step_s.sum():.2g} s, in which no cycle was completed: record more of them."
            )
        if self.interval is None:
            return (
                f"Static: balancing while serving changes throughput by {gain:+.1%} over a map planned on "
                f"earlier load: the load hardly drifts, or faster than the balancer follows."
            )
        best = self.dynamic[self.interval]
        return (
            f"Dynamic, from collections of {self.interval} steps: throughput {gain:+.1%} and balancedness "
            f"{best.balancedness.mean():.3f} against {self.static.balancedness.mean():.3f} of a map that "
            f"stays, with {best.experts_moved} experts moved in {self.num_simulated_steps} steps."
        )


def execution_interval(collection_interval: int) -> int:
    """Steps that a plan may take: the default, or a quarter of a short collection."""
    default = int(EplbConfig.model_fields["algorithm_execution_interval"].default)
    return min(default, collection_interval // 4)


def expert_memory_gb(profile: HardwareProfile, num_layers: int, slots_per_rank: int) -> float:
    """Of a rank: its slots in every layer, and staging for one layer."""
    return (num_layers + 1) * slots_per_rank * profile.model.expert_bytes / 1e9


def advise(
    trace: LoadTrace,
    question: Question,
    *,
    steps: range | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Advice:
    """Search, on `steps` of the trace, all by default.

    progress: told what is done now, how much is done, and of how much

    Memory does not grow with the trace. Raises ValueError where nothing fits in the memory, where there are
    fewer than 4 steps, or no token in either half.
    """
    steps = range(trace.num_steps) if steps is None else steps
    if len(steps) < 4:
        raise ValueError(f"{len(steps)} steps, expected at least 4: half are planned on, half judged")
    groups = question.num_expert_groups
    if groups < 1 or trace.num_logical_experts % groups:
        raise ValueError(
            f"num_expert_groups is {groups}, expected a divisor of the {trace.num_logical_experts} experts"
        )
    load_algorithm(question.algorithm)().warm_up()
    middle = steps.start + len(steps) // 2
    windows = _windows(trace, range(steps.start, middle))
    layers = np.unique(np.linspace(0, trace.num_layers - 1, JUDGED_LAYERS).astype(int))
    judged = _Judged(trace, range(middle, steps.stop), layers)
    shapes = list(_shapes(trace, question))
    choices = []
    for done, (topology, slots, groups) in enumerate(shapes):
        progress(f"EP {topology.num_ranks}, {slots} slots", done, len(shapes) + 1)
        choices.append(_judge(question, windows[:, layers], judged, topology, slots, groups))
    choices = _with_front(sorted(choices, key=lambda choice: (choice.memory_gb, choice.topology.num_ranks)))
    chosen, without, other = _choose(choices, question)
    simulated = range(middle, min(steps.stop, middle + SIMULATED_STEPS))
    progress("static or dynamic", len(shapes), len(shapes) + 1)
    groups = question.num_expert_groups if chosen.is_hierarchical else 1
    planned = _plan(question, windows, chosen.topology, chosen.slots_per_rank, groups)
    static, dynamic = _simulate(trace, question, planned, groups, simulated)
    progress("done", len(shapes) + 1, len(shapes) + 1)
    best = max(dynamic, key=lambda interval: dynamic[interval].throughput, default=None)
    if best is not None and dynamic[best].throughput < static.throughput * (1 + WORTH):
        best = None
    return Advice(
        question=question,
        choices=choices,
        chosen=chosen,
        without=without,
        other_placement=other,
        static=static,
        dynamic=dynamic,
        interval=best,
        num_planned_steps=middle - steps.start,
        num_simulated_steps=len(simulated),
    )


def _windows(trace: LoadTrace, steps: range) -> _Floats:
    """[windows, layers, logical], tokens, the steps in equal parts."""
    bounds = np.linspace(steps.start, steps.stop, min(NUM_WINDOWS, len(steps)) + 1).astype(int).tolist()
    windows = np.zeros((len(bounds) - 1, trace.num_layers, trace.num_logical_experts))
    for window, (first, end) in enumerate(pairwise(bounds)):
        for start in range(first, end, _STEPS_AT_ONCE):
            piece = trace.expert_load[start : min(end, start + _STEPS_AT_ONCE)]
            windows[window] += piece.sum(axis=0, dtype=np.float64)
            release_pages(trace.expert_load)
    if not windows.any():
        raise ValueError(f"no token in the {len(steps)} steps to plan on")
    return windows


class _Judged:
    """`layers` of evenly spaced steps with tokens, held in memory."""

    def __init__(self, trace: LoadTrace, steps: range, layers: NDArray[np.int64]) -> None:
        numbers = np.unique(np.linspace(steps.start, steps.stop - 1, JUDGED_STEPS).astype(int))
        load = np.array(trace.expert_load[numbers][:, layers], dtype=np.float64)
        self.num_layers = trace.num_layers
        release_pages(trace.expert_load)
        served = load.any(axis=(1, 2))
        if not served.any():
            raise ValueError(f"no token in the {len(numbers)} steps to be judged")
        self.load = load[served]
        self.phase = [Phase(int(phase)) for phase in trace.phase[numbers[served]]]

    @property
    def choices_of_a_token(self) -> float:
        """Pairs of a token and an expert in a layer, mean over steps and layers with load."""
        of_layer = self.load.sum(axis=2)
        return float(of_layer[of_layer > 0].mean())


def _shapes(trace: LoadTrace, question: Question) -> Iterable[tuple[Topology, int, int]]:
    """Topology, slots of a rank and expert groups to try; hierarchical placement where it is possible."""
    profile, experts = question.profile, trace.num_logical_experts

    def fits(slots: int) -> bool:
        return expert_memory_gb(profile, trace.num_layers, slots) <= question.memory_gb

    asked = question.ep_sizes or [size for size in EP_SIZES if size <= experts] or [experts]
    sizes = [size for size in asked if fits(-(-experts // size))]
    if not sizes:
        size = max(asked, default=1)
        least = expert_memory_gb(profile, trace.num_layers, -(-experts // size))
        raise ValueError(
            f"{question.memory_gb:g} GB do not hold the experts: EP size {size} needs {least:.1f} GB on each "
            "rank"
        )
    for size in sizes if question.ep_sizes else sizes[:MOST_EP_SIZES]:
        topology = Topology(size, -(-size // profile.links.ranks_per_node))
        groups = question.num_expert_groups
        can_group = groups > 1 and topology.num_nodes > 1 and groups % topology.num_nodes == 0
        for further in FURTHER_SLOTS:
            slots = -(-experts // size) + further
            if fits(slots) and slots <= experts:
                yield topology, slots, 1
                if can_group:
                    yield topology, slots, groups


def _plan(
    question: Question, windows: _Floats, topology: Topology, slots_per_rank: int, groups: int
) -> ExpertMap:
    return rebalance_experts(
        windows,
        num_physical_experts=slots_per_rank * topology.num_ranks,
        topology=topology,
        num_expert_groups=groups,
        algorithm=question.algorithm,
    ).expert_map


def _judge(
    question: Question, windows: _Floats, judged: _Judged, topology: Topology, slots: int, groups: int
) -> Choice:
    planned = _plan(question, windows, topology, slots, groups)
    model = StepTime(question.profile, topology)
    works = [rank_work(load, planned) for load in judged.load]
    seconds = [model.step(work, phase) for work, phase in zip(works, judged.phase, strict=True)]
    step_s = float(np.mean(seconds)) * judged.num_layers / planned.num_layers
    tokens = judged.choices_of_a_token / question.profile.model.experts_per_token
    return Choice(
        topology=topology,
        redundant_experts=planned.num_redundant_experts,
        slots_per_rank=slots,
        is_hierarchical=groups > 1,
        memory_gb=expert_memory_gb(question.profile, judged.num_layers, slots),
        balancedness=float(np.mean([work.balancedness for work in works])),
        step_s=step_s,
        tokens_per_s=tokens / step_s / topology.num_ranks,
    )


def _with_front(choices: Sequence[Choice]) -> list[Choice]:
    def is_beaten(choice: Choice) -> bool:
        return any(other.beats(choice) for other in choices)

    return [replace(choice, on_front=not is_beaten(choice)) for choice in choices]


def _choose(choices: Sequence[Choice], question: Question) -> tuple[Choice, Choice, Choice | None]:
    """The one to deploy, the one on the same ranks with the fewest slots, and the other way of placing."""

    def cost(choice: Choice) -> float:
        return choice.step_s if question.for_latency else 1 / choice.tokens_per_s

    best = min(choices, key=cost)
    same_ranks = [choice for choice in choices if choice.topology == best.topology]
    good = [choice for choice in same_ranks if cost(choice) <= cost(best) * (1 + WORTH)]
    fewest = min(choice.slots_per_rank for choice in good)
    candidates = [choice for choice in good if choice.slots_per_rank == fewest]
    chosen = next((choice for choice in candidates if choice.is_hierarchical), candidates[0])
    alike = [choice for choice in same_ranks if choice.is_hierarchical == chosen.is_hierarchical]
    without = min(alike, key=lambda choice: choice.slots_per_rank)
    other = [
        choice
        for choice in same_ranks
        if choice.slots_per_rank == fewest and choice.is_hierarchical != chosen.is_hierarchical
    ]
    return chosen, without, other[0] if other else None


def _simulate(
    trace: LoadTrace, question: Question, planned: ExpertMap, groups: int, steps: range
) -> tuple[Result, dict[int, Result]]:
    """The map that was planned left as it is, and with balancing from there, by collection interval."""
    intervals = [interval for interval in INTERVALS if interval <= len(steps) // 3]
    if not intervals and len(steps) >= 12:
        intervals = [len(steps) // 4]

    def setting(interval: int) -> Setting:
        return Setting(
            planned.topology,
            planned.num_redundant_experts,
            question.profile,
            EplbConfig(
                expert_heat_collection_interval=interval,
                algorithm_execution_interval=execution_interval(interval),
            ),
            num_expert_groups=groups,
        )

    static = FixedMap("static", planned, setting(1))
    balanced = [
        Balanced(question.algorithm, planned, setting(interval), name=str(interval)) for interval in intervals
    ]
    results = replay(
        trace,
        [static, *balanced],
        steps=steps,
        unseen=0,
        experts_per_token=question.profile.model.experts_per_token,
    )
    return results[0], dict(zip(intervals, results[1:], strict=True))
