"""A load trace replayed through the real balancer in simulated time, beside layouts that never change.

Every contender serves the same steps. Those of the first collection are not judged: nobody has seen any load
before it. Whatever is judged is served by a map that was planned on earlier steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.offline.serving import Balanced, Contender, FixedMap, PlannedOnce, Setting, Tokens
from eplb_platform.records.load_trace import LoadTrace, release_pages

INITIAL, STATIC = "initial", "static"
_CHUNK_ENTRIES = 1 << 22
_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Result:
    """What a contender made of the judged steps.

    balancedness, step_s: [judged steps with tokens], mean over layers of mean / max rank load, and seconds
        with waits and swaps
    phase: [judged steps with tokens]
    experts_moved: that ranks received from other ranks, bytes_moved their weights
    wait_s: of the forward thread for the decision on a commit; swap_s: for weights copied into their slots
    planning_s: seconds that each plan took on this machine
    """

    name: str
    balancedness: _Floats
    step_s: _Floats
    phase: NDArray[np.uint8]
    tokens: float
    cycles: int = 0
    failed_cycles: int = 0
    commits: int = 0
    skipped_layers: int = 0
    experts_moved: int = 0
    bytes_moved: float = 0.0
    wait_s: float = 0.0
    longest_wait_s: float = 0.0
    swap_s: float = 0.0
    longest_swap_s: float = 0.0
    planning_s: Sequence[float] = ()
    last_error: str = ""

    @property
    def throughput(self) -> float:
        """Tokens in a second, over the judged steps."""
        return self.tokens / float(self.step_s.sum())

    def mean_step_s(self, phase: Phase | None = None) -> float | None:
        """Of all judged steps, or those of a phase; None where there is none."""
        chosen = self.step_s if phase is None else self.step_s[self.phase == phase]
        return float(chosen.mean()) if chosen.size else None


def simulate(
    trace: LoadTrace,
    setting: Setting,
    algorithms: Sequence[str],
    *,
    steps: range | None = None,
    deployed: Mapping[str, ExpertMap] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Replay `steps` of the trace, all by default: the layout that engines start with, one that is planned
    once on the first collection, the maps in `deployed`, and each of `algorithms` while serving.

    progress: told how many steps are done, and of how many

    Memory does not grow with the trace but for some numbers of each step. Raises ValueError where maps and
    trace do not fit, for an unknown algorithm, and where no step is left to be judged.
    """
    steps = range(trace.num_steps) if steps is None else steps
    unseen = setting.config.expert_heat_collection_interval
    if len(steps) <= unseen:
        raise ValueError(
            f"{len(steps)} steps, expected more than the {unseen} of the first collection "
            "(expert_heat_collection_interval), which no plan is judged on"
        )
    initial = ExpertMap.initial(
        trace.num_layers, trace.num_logical_experts, setting.topology, setting.num_redundant_experts
    )
    contenders: list[Contender] = [
        FixedMap(INITIAL, initial, setting),
        PlannedOnce(STATIC, initial, setting),
        *(FixedMap(name, expert_map, setting) for name, expert_map in (deployed or {}).items()),
        *(Balanced(name, initial, setting) for name in algorithms),
    ]
    return replay(
        trace,
        contenders,
        steps=steps,
        unseen=unseen,
        experts_per_token=setting.profile.model.experts_per_token,
        progress=progress,
    )


def replay(
    trace: LoadTrace,
    contenders: Sequence[Contender],
    *,
    steps: range,
    unseen: int,
    experts_per_token: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Let every contender serve `steps`, of which all but the first `unseen` are judged."""
    tallies = [_Tally(contender) for contender in contenders]
    try:
        for number, load, phase in _passes(trace, steps):
            progress(number, len(steps))
            for tally in tallies:
                tally.add(load, phase, is_judged=number >= unseen)
    finally:
        for contender in contenders:
            contender.close()
    progress(len(steps), len(steps))
    return [tally.result(experts_per_token) for tally in tallies]


def _passes(trace: LoadTrace, steps: range) -> Iterator[tuple[int, Tokens, Phase]]:
    """Each step with its number among `steps`, in bounded memory."""
    at_once = max(1, _CHUNK_ENTRIES // (trace.num_layers * trace.num_logical_experts))
    for start in range(steps.start, steps.stop, at_once):
        end = min(start + at_once, steps.stop)
        chunk = np.array(trace.expert_load[start:end], dtype=np.int64)
        release_pages(trace.expert_load)
        for i, load in enumerate(chunk):
            yield start + i - steps.start, load, Phase(int(trace.phase[start + i]))


class _Tally:
    """What is kept of every judged step of one contender."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._balancedness: list[float] = []
        self._step_s: list[float] = []
        self._phase: list[int] = []
        self._choices = 0.0

    def add(self, load: Tokens, phase: Phase, *, is_judged: bool) -> None:
        work, seconds = self._contender.serve(load, phase)
        of_layer = load.sum(axis=1)
        if is_judged and of_layer.any():
            self._balancedness.append(work.balancedness)
            self._step_s.append(seconds)
            self._phase.append(int(phase))
            self._choices += float(of_layer[of_layer > 0].mean())

    def result(self, experts_per_token: int) -> Result:
        if not self._step_s:
            raise ValueError("no token in the steps after the first collection")
        return Result(
            name=self._contender.name,
            balancedness=np.array(self._balancedness),
            step_s=np.array(self._step_s),
            phase=np.array(self._phase, dtype=np.uint8),
            tokens=self._choices / experts_per_token,
            **self._contender.counters(),  # type: ignore[arg-type]  # its fields, which the protocol says
        )
