"""Who serves in an engine that resizes: ranks that leave, die, are started anew and join."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eplb_platform.testing.cluster.scheduler import Scheduler, Task

TRIES = 25
"""So many calls of a rank that fail one after the other are too many."""


@dataclass(eq=False)
class Wish:
    """What all ranks call `resize` with."""

    active: tuple[int, ...]
    dead: tuple[int, ...] | None
    why: str = ""
    on_begin: Callable[[], None] = lambda: None
    """Called while the pass runs after which ranks call."""
    is_refused: bool = False
    is_over: bool = False


@dataclass
class Membership:
    """Which ranks take part in passes, and what the engine wants to have changed.

    room: as many active ranks as the experts need
    restart: starts a new process for a rank, soon
    """

    scheduler: Scheduler
    draw: random.Random
    num_ranks: int
    room: int
    violate: Callable[[str], None]
    restart: Callable[[int], None] = lambda rank: None
    loads_experts: bool = True
    """Whether the engine gives `load_expert`; from the first lost expert on it does."""
    replaces_the_dead: bool = False
    """A new process takes a dead rank's place; else the others go on without it."""
    active: set[int] = field(default_factory=set)
    """As of the last resize; all ranks at the start."""
    serving: set[int] = field(default_factory=set)
    """Active ranks whose process lives."""
    calling: set[int] = field(default_factory=set)
    """Ranks that are in `resize`."""
    planned: Wish | None = None
    """What is wanted from the next pass on."""
    wish: Wish | None = None
    """What is wanted now."""
    last_wish: Wish | None = None
    deaths: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """What came of resizes."""
    is_ended: bool = False
    _outcomes: dict[int, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    """By generation, the active ranks that were agreed, and how many passes all of them count."""
    _waiting: list[Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.active = set(range(self.num_ranks))
        self.serving = set(self.active)

    @property
    def is_broken(self) -> bool:
        """Whether a rank that should take part in passes cannot."""
        return self.active != self.serving

    @property
    def has_resized(self) -> bool:
        """Whether ranks were ever others than at the start, or other processes."""
        return bool(self._outcomes) or self.is_broken

    def lose(self, rank: int) -> None:
        """The rank's process is gone, or serves no more."""
        self.calling.discard(rank)
        if rank not in self.serving:
            return
        self.serving.discard(rank)
        self.deaths += 1
        if not self.serving:
            self.end()
            return
        self._go_on_without_the_dead()

    def _go_on_without_the_dead(self) -> None:
        dead = sorted(self.active - self.serving)
        if self.replaces_the_dead or len(self.serving) < self.room:
            self.wish = Wish(tuple(sorted(self.active)), self.draw.choice(((), None)), "replace")
            for one in dead:
                self.restart(one)
        else:
            explicit = self.draw.random() < 0.8
            self.wish = Wish(tuple(sorted(self.serving)), tuple(dead) if explicit else None, "go on without")
        self.last_wish = self.wish
        self.wake()

    def begin_pass(self) -> Wish | None:
        """What all ranks are to call for after this pass."""
        self.wish, self.planned = self.planned, None
        if self.wish is not None:
            self.last_wish = self.wish
            self.wish.on_begin()
            self.wake()
        return self.wish

    def agreed(self, rank: int, generation: int, active: Sequence[int], passes: int) -> None:
        """`rank` returned from `resize`: these ranks are active, and it counts so many passes."""
        here = tuple(active), passes
        elsewhere = self._outcomes.setdefault(generation, here)
        if here != elsewhere:
            self.violate(
                f"rank {rank}: resize {generation} ends with active ranks and passes {here}, "
                f"elsewhere {elsewhere}"
            )
        if self.counts["agreed"] < len(self._outcomes):
            self.counts["agreed"] += 1
            self.counts["ranks left"] += len(self.active - set(active))
            self.counts["ranks joined"] += len(set(active) - self.serving)
            self.serving = (self.serving | self.calling) & set(active)
            self.active = set(active)
            if self.wish is not None and not self.is_broken:
                self.wish.is_over = True
        self.calling.discard(rank)

    def refused(self, rank: int, generation: int, wish: Wish, gone: Sequence[int]) -> None:
        """`resize` raised on `rank`; of the ranks, only those that are `gone` may be others now."""
        if generation in self._outcomes:
            self.violate(f"rank {rank}: resize {generation} is refused here and was agreed elsewhere")
        if not wish.is_refused:
            wish.is_refused = True
            self.counts["refused"] += 1
        self.calling.discard(rank)
        if self.serving & set(gone):
            self.serving -= set(gone)
            self.deaths += 1
            self._go_on_without_the_dead()

    async def call_for(self, rank: int) -> Wish | None:
        """What a rank that is not active is to call for, once it is; None when the engine ends."""
        while not self.is_ended:
            wish = self.wish
            is_called = wish is not None and rank in wish.active and not wish.is_over
            if wish is not None and is_called and (self.is_broken or not wish.is_refused):
                return wish
            task = self.scheduler.current
            assert task is not None
            self._waiting.append(task)
            await self.scheduler.park(None)
        return None

    def end(self) -> None:
        """No rank serves any more."""
        self.is_ended = True
        self.wake()

    def wake(self) -> None:
        """Ranks that are not active look again."""
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            self.scheduler.wake(task)
