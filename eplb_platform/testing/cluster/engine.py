"""The serving engine as the balancer sees it: forward passes in which all ranks meet, and what must hold in
each.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.runtime.resizing import LostExpertsError
from eplb_platform.testing.cluster.membership import Membership, Wish
from eplb_platform.testing.cluster.scenario import TIMEOUT_S, Scenario
from eplb_platform.testing.cluster.scheduler import Scheduler, Task
from eplb_platform.testing.cluster.weights import EXPERT, VERSION, TaggedWeights

MODEL_TIMEOUT_S = 20 * TIMEOUT_S
"""Of the model's own collectives: after it, all ranks of an engine end that has lost one."""
MOST_TOKENS = 3
"""A rank has so many times the basic load in a pass, at most."""


class EngineFailed(RuntimeError):
    """The model's own collectives ended, since a rank is missing."""


@dataclass
class Pass:
    """What one forward pass computed: the truth that collected loads are compared with."""

    phase: Phase
    tokens: NDArray[np.int64]
    """[ranks], multiples of the basic load; 0 for a rank without requests."""
    is_dummy: NDArray[np.bool_]
    wish: Wish | None = None
    """What ranks call for after it."""
    is_broken: bool = False
    """A rank died in it: where it has not ended yet it counts for nothing."""


@dataclass
class Trace:
    """What happened, for people."""

    is_kept: bool
    lines: list[str] = field(default_factory=list)

    def add(self, time: float, text: str) -> None:
        if self.is_kept:
            self.lines.append(f"{time:10.4f} s  {text}")


class Engine:
    """Forward passes of all ranks, in lock step, and the checks at each of them.

    Every rank that is a member takes part in each pass: its all-to-all makes it wait for the others.
    """

    def __init__(self, scenario: Scenario, scheduler: Scheduler, trace: Trace, expert_map: ExpertMap) -> None:
        self.scenario = scenario
        self.scheduler = scheduler
        self.trace = trace
        self.random = random.Random(f"engine {scenario.seed}")
        self.weights = TaggedWeights(expert_map)
        self.members = set(range(scenario.num_ranks))
        self.membership: Membership | None = None
        """In an engine that resizes."""
        if scenario.resizes:
            self.membership = Membership(
                scheduler,
                self.random,
                scenario.num_ranks,
                -(-scenario.num_logical // scenario.slots_per_rank),
                self.violate,
            )
        self.passes: list[Pass] = []
        self.last_pass: int | None = None
        """The pass after which all ranks end."""
        self.failure = ""
        self.violations: list[str] = []
        self.injected: Counter[str] = Counter()
        self.idle_s = 0.0
        """Before the next pass."""
        self.slowness = np.ones(scenario.num_ranks)
        """[ranks], factor on the time of a pass."""
        self.maps_in_force: set[str] = {expert_map.digest()}
        self.longest_stretch_s = 0.0
        shape = (scenario.num_layers, scenario.num_logical)
        self.basic_load = np.random.default_rng(scenario.seed).integers(0, 50, shape) ** 2
        """[layers, logical], tokens."""
        self._counted_before = [0]
        """Tokens that count before each pass, in multiples of the basic load, over all ranks."""
        self._rows: list[NDArray[np.int32]] = []
        self._row_numbers: dict[bytes, int] = {}
        numbers = [self.row_number(row) for row in expert_map.physical_to_logical]
        self.routed = np.tile(np.array(numbers, dtype=np.int32), (scenario.num_ranks, 1))
        """[ranks, layers], the number of the row that each rank routes each layer by."""
        self._commit_boundaries: list[int] = []
        self.commits = np.zeros(scenario.num_ranks, dtype=np.int64)
        """[ranks], commits executed."""
        self._arrived: dict[int, Task] = {}
        self._recorded_generation = 0
        self._running: dict[int, Pass] = {}
        """The pass that each rank is in."""
        self._sent_away: set[int] = set()
        """Ranks that came to a pass which cannot begin."""
        self._checked: NDArray[np.int32] | None = None
        self.must_check = True
        self.started: set[int] = set()
        self.on_pass: Callable[[int], None] = lambda step: None
        """Called with the number of each pass, while it runs."""

    # --- what ranks call ---

    @property
    def step(self) -> int:
        """Passes that have begun."""
        return len(self.passes)

    def is_over_after(self, step: int) -> bool:
        """Whether ranks end after pass number `step`."""
        return self.last_pass is not None and step >= self.last_pass

    async def forward(self, rank: int) -> Pass | None:
        """One forward pass of `rank`; returns when it has ended there, or None where it is broken since a
        rank is missing, in an engine that resizes.
        """
        if self.failure:
            raise EngineFailed(self.failure)
        membership = self.membership
        if membership is not None and (membership.is_broken or rank not in membership.active):
            return None
        task = self.scheduler.current
        assert task is not None
        self._arrived[rank] = task
        if len(self._arrived) == len(self.members):
            self.scheduler.call_at(self.scheduler.now, self._begin)
        await self.scheduler.park(None)
        if self.failure:
            raise EngineFailed(self.failure)
        if rank in self._sent_away:
            self._sent_away.discard(rank)
            return None
        ended = self._running.pop(rank)
        return None if ended.is_broken else ended

    def leave(self, rank: int, why: str) -> None:
        """The rank makes no more passes: it died or stopped."""
        if self.membership is not None:
            self._lose(self.membership, rank, why)
            return
        if rank not in self.members:
            return
        self._arrived.pop(rank, None)
        self.trace.add(self.scheduler.now, f"rank {rank} left: {why}")
        if self.scenario.tolerates_death and len(self.members) > 1:
            self.members.discard(rank)
            if len(self._arrived) == len(self.members):
                self.scheduler.call_at(self.scheduler.now, self._begin)
        elif self.last_pass is None or self.step < self.last_pass:
            # It stays a member that never comes: the others' next pass does not end.
            self.scheduler.call_at(self.scheduler.now + MODEL_TIMEOUT_S, lambda: self._fail(why))

    def _lose(self, membership: Membership, rank: int, why: str) -> None:
        """The pass that runs may still end, the next one does not begin."""
        self.trace.add(self.scheduler.now, f"rank {rank} left: {why}")
        self._arrived.pop(rank, None)
        self._running.pop(rank, None)
        self._sent_away.discard(rank)
        self.weights.forget(rank)
        membership.lose(rank)
        if not membership.is_broken:
            return
        if self.passes and not self._arrived and self.random.random() < 0.5:
            self.passes[-1].is_broken = True
        self._sent_away |= set(self._arrived)
        for task in self._arrived.values():
            self.scheduler.wake(task)
        self._arrived.clear()

    def resized(
        self, rank: int, generation: int, active: Sequence[int], passes: int, expert_map: ExpertMap
    ) -> None:
        """`rank` returned from `resize`: these ranks are active, it counts so many passes, and has this
        map.
        """
        assert self.membership is not None
        if rank in active:
            self.membership.agreed(rank, generation, active, passes)
        self.membership.calling.discard(rank)
        self.members = set(self.membership.active)
        self.follows(rank, expert_map)
        if rank not in active:
            self.weights.forget(rank)
        self.trace.add(self.scheduler.now, f"rank {rank}: resize {generation}: {list(active)}")

    def follows(self, rank: int, expert_map: ExpertMap) -> None:
        """`resize` ended on `rank`; commits that it executed are not counted."""
        self.maps_in_force.add(expert_map.digest())
        self.commits[rank] = len(self._commit_boundaries)
        self.must_check = True

    def load_expert(self, layer: int, expert: int) -> list[torch.Tensor]:
        """From the checkpoint."""
        assert self.membership is not None
        self.membership.counts["experts loaded"] += 1
        return [torch.tensor([expert, self.weights.version])]

    def names_experts(self, error: LostExpertsError, *, is_exact: bool) -> None:
        """`resize` says which experts are lost; the engine gives `load_expert` from now on.

        is_exact: no rank died meanwhile
        """
        assert self.membership is not None
        self.membership.loads_experts = True
        self.membership.counts["calls that named lost experts"] += 1
        lost = set(self._lost_experts(self.membership.serving - set(error.gone)))
        named = set(error.experts)
        if not named or named - lost or (is_exact and lost - named):
            self.violate(f"{sorted(named)} are said to be lost, and {sorted(lost)} are")

    def cannot_resize(self, why: str) -> None:
        """The engine gives up."""
        self.violate(f"no resize succeeds: {why}")
        self._fail(why)

    def _lost_experts(self, living: set[int]) -> list[tuple[int, int]]:
        """(layer, expert) that no rank of `living` holds."""
        held = self.weights.tags[..., EXPERT][:, sorted(living)]
        everything = np.arange(self.scenario.num_logical)
        return [
            (layer, int(expert))
            for layer, there in enumerate(held)
            for expert in everything[~np.isin(everything, there)]
        ]

    def routes_by(self, rank: int, layers: Sequence[int], expert_map: ExpertMap) -> None:
        """`rank` routes `layers` by `expert_map` from its next pass on."""
        table = expert_map.physical_to_logical
        for layer in layers:
            self.routed[rank, layer] = self.row_number(table[layer])
        self.maps_in_force.add(expert_map.digest())  # some only until the resize that ends their cycle
        self.must_check = True

    def committed(self, rank: int, expert_map: ExpertMap) -> None:
        """`rank` has executed a commit."""
        if rank not in self.members:
            return  # it does not know yet that the others go on without it
        number = int(self.commits[rank])
        self.commits[rank] += 1
        if number == len(self._commit_boundaries):
            self._commit_boundaries.append(self.step)
            self.maps_in_force.add(expert_map.digest())
        elif self._commit_boundaries[number] != self.step:
            self.violate(
                f"rank {rank} executes commit {number} after pass {self.step}, "
                f"others after pass {self._commit_boundaries[number]}"
            )
        active = self.commits[sorted(self.members)]
        if active.size and active.max() - active.min() > 1:
            self.violate(f"ranks are {active.max() - active.min()} commits apart")
        self.trace.add(self.scheduler.now, f"rank {rank}: commit {number} after pass {self.step}")

    def has_started(self, rank: int, expert_map: ExpertMap) -> None:
        """The rank serves from now on, by `expert_map`."""
        self.started.add(rank)
        self.maps_in_force.add(expert_map.digest())

    def recorded(self, rank: int, generation: int) -> None:
        """`rank` has written the record of the map, as of this change of the active ranks."""
        if generation < self._recorded_generation:
            self.violate(f"rank {rank}: writes over the record of ranks that went on without it")
        self._recorded_generation = generation

    def load_anew(self, rank: int, expert_map: ExpertMap, version: int) -> None:
        """The engine writes the rank's weights from its checkpoint."""
        self.weights.load(rank, expert_map, version)
        self.weights.version = version
        self.maps_in_force.add(expert_map.digest())
        self.must_check = True

    def row_number(self, row: NDArray[np.int32]) -> int:
        """Equal for equal rows of a map."""
        key = row.tobytes()
        number = self._row_numbers.get(key)
        if number is None:
            number = self._row_numbers[key] = len(self._rows)
            self._rows.append(row)
        return number

    def violate(self, text: str) -> None:
        """A rule was broken: the run ends."""
        self.violations.append(f"at {self.scheduler.now:.4f} s, pass {self.step}: {text}")
        self.trace.add(self.scheduler.now, f"VIOLATION: {text}")
        self.scheduler.stop()

    def inject(self, kind: str, rank: int | None = None) -> None:
        """A fault takes effect."""
        self.injected[kind] += 1
        self.trace.add(self.scheduler.now, f"fault: {kind}" + ("" if rank is None else f" on rank {rank}"))

    # --- the truth about load ---

    @property
    def counts_all(self) -> bool:
        """Whether every pass counts on every rank: ranks that leave take what they counted with them."""
        return self.membership is None or not self.membership.has_resized

    def is_served(self, load: NDArray[np.int64] | NDArray[np.float64]) -> bool:
        """Whether `load` [..., layers, logical] may be of any passes on any ranks."""
        layer, expert = divmod(int(self.basic_load.argmax()), self.basic_load.shape[1])
        times = load[..., layer, expert] // max(1, int(self.basic_load[layer, expert]))
        return bool((load == times[..., None, None] * self.basic_load).all())

    def window_tokens(self, first: int, end: int) -> int:
        """What passes `first` to `end` - 1 count, over all ranks, in multiples of the basic load."""
        late = int(self.scenario.counts_late)
        return self._counted_before[max(0, end - late)] - self._counted_before[max(0, first - late)]

    # --- passes ---

    def _begin(self) -> None:
        """All ranks are in the same pass: what they route by must be there."""
        if self.failure or len(self._arrived) < len(self.members) or not self._arrived:
            return
        if self.membership is not None and self.membership.is_broken:
            return
        self._check()
        scenario, scheduler = self.scenario, self.scheduler
        self.passes.append(self._new_pass())
        tasks, self._arrived = self._arrived, {}
        pause, self.idle_s = self.idle_s, 0.0
        slowest = max(float(self.slowness[rank]) for rank in tasks)
        duration = scenario.step_s * slowest * (1 + scenario.uneven_steps * self.random.random())
        for rank, task in tasks.items():
            self._running[rank] = self.passes[-1]
            skew = 0.02 * scenario.step_s * self.random.random()
            scheduler.wake_at(scheduler.now + pause + duration + skew, task)
        self.on_pass(self.step)

    def _new_pass(self) -> Pass:
        scenario, draw = self.scenario, self.random
        rng = np.random.default_rng(draw.getrandbits(32)) if scenario.dummy_ranks else None
        ranks = scenario.num_ranks
        dummy = np.zeros(ranks, bool) if rng is None else rng.random(ranks) < scenario.dummy_ranks * 0.9
        first = draw.randrange(MOST_TOKENS)
        tokens = (np.arange(ranks) + first) % (MOST_TOKENS + 1)
        if draw.random() < 0.1:
            dummy[:] = True
        result = Pass(draw.choice(list(Phase)), tokens, dummy)
        members = sorted(self.members)
        tokens[[rank for rank in range(ranks) if rank not in self.members]] = 0
        if self.membership is not None:
            result.wish = self.membership.begin_pass()
        wanted = scenario.config.load_collection_phase
        counts = wanted == "all" or result.phase in (Phase.MIXED, Phase[wanted.upper()])
        total = int((tokens * ~dummy)[members].sum()) if counts else 0
        self._counted_before.append(self._counted_before[-1] + total)
        return result

    def _fail(self, why: str) -> None:
        if not self.failure:
            self.failure = f"the model's collectives timed out: {why}"
            self.trace.add(self.scheduler.now, self.failure)
            for task in self._arrived.values():
                self.scheduler.wake(task)
            self._arrived.clear()
            if self.membership is not None:
                self.membership.end()

    def _check(self) -> None:
        """Every member routes every layer by one row, and holds what the row says."""
        if not self.must_check:
            return
        self.must_check = False
        members = sorted(self.members)
        differs = np.argwhere(self.routed[members] != self.routed[members[0]])
        if len(differs):
            rank, layer = members[int(differs[0][0])], int(differs[0][1])
            self.violate(
                f"layer {layer}: rank {rank} routes by another map than rank {members[0]} in one pass"
            )
            return
        rows = np.stack([self._rows[number] for number in self.routed[members[0]]])
        expected = rows.reshape(len(rows), self.scenario.num_ranks, -1)
        if self.membership is not None:
            others = [rank for rank in range(self.scenario.num_ranks) if rank not in self.members]
            if (expected[:, others] >= 0).any():
                self.violate(f"wrong token: one of ranks {others}, none of which is active, takes tokens")
                return
        for what, field_, want in (
            ("expert", EXPERT, expected),
            ("version", VERSION, np.int64(self.weights.version)),
        ):
            wrong = self.weights.tags[..., field_] != want
            wrong = wrong[:, members]
            if wrong.any():
                layer, place, slot = (int(index) for index in np.argwhere(wrong)[0])
                rank = members[place]
                there = int(self.weights.tags[layer, rank, slot, field_])
                self.violate(
                    f"wrong token: layer {layer}, rank {rank}, slot {slot} holds {what} {there}, "
                    f"but is routed as expert {int(expected[layer, rank, slot])} "
                    f"of version {self.weights.version}"
                )
                return
