"""Many seeds: run over all cores, counted together."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context

from eplb_platform.testing.cluster.simulation import Result, simulate

SEEDS_PER_TASK = 10
COLLECT_AFTER = 50_000
"""New objects between two looks of the garbage collector: a run makes many, and few of them in circles."""


@dataclass
class Tally:
    """What many seeds came to."""

    seeds: int = 0
    passes: int = 0
    commits: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    """Faults that took effect, by kind."""
    cycles: Counter[str] = field(default_factory=Counter)
    """Cycles of single ranks, by outcome."""
    faulty: int = 0
    """Runs in which something went wrong and had to be well again."""
    recovered: int = 0
    resizes: Counter[str] = field(default_factory=Counter)
    """What came of calls of `resize`."""
    longest_wait_steps: float = 0.0
    failures: list[Result] = field(default_factory=list)
    """Runs in which a rule was broken."""
    seconds: float = 0.0

    def add(self, result: Result) -> None:
        """Count one run."""
        self.seeds += 1
        self.passes += result.passes
        self.commits += result.commits
        self.injected += result.injected
        self.cycles += result.cycles
        self.resizes += result.resizes
        self.faulty += result.recovered is not None
        self.recovered += result.recovered is True
        self.longest_wait_steps = max(self.longest_wait_steps, result.longest_wait_steps)
        if result.violations:
            self.failures.append(result)

    @property
    def wrong_tokens(self) -> int:
        """Runs in which a rank routed by a map whose weights were not there."""
        return sum("wrong token" in text for result in self.failures for text in result.violations)

    def lines(self) -> list[str]:
        """The numbers, for people."""
        per_minute = 60 * self.seeds / self.seconds if self.seconds else 0.0
        aborted = self.cycles["failed"] + self.cycles["cancelled"]
        good = self.cycles["moved"] + self.cycles["stayed"] + self.cycles["no_load"]
        resizes = ", ".join(f"{what} {count}" for what, count in sorted(self.resizes.items()))
        faults = ", ".join(f"{kind} {count}" for kind, count in self.injected.most_common())
        return [
            f"{self.seeds} seeds in {self.seconds:.0f} s ({per_minute:.0f} seeds per minute): "
            f"{self.passes} passes, {self.commits} commits",
            f"faults injected: {self.injected.total()}: {faults or 'none'}",
            f"cycles on single ranks: {good} good, {aborted} aborted "
            f"({self.cycles['failed']} failed, {self.cycles['cancelled']} cancelled)",
            f"resizes: {resizes or 'none'}",
            f"recovered: {self.recovered} of {self.faulty} runs that had to be well again",
            f"longest wait: {self.longest_wait_steps:.1f} steps",
            f"wrong tokens: {self.wrong_tokens}; rules broken: {len(self.failures)}",
            *(f"seed {one.seed}: {one.violations[0]}\n  {one.replay}" for one in self.failures),
        ]


def run_seeds(
    seeds: Iterable[int],
    *,
    num_ranks: int | None = None,
    processes: int | None = None,
    on_progress: Callable[[Tally], None] = lambda tally: None,
    stop_at_failure: bool = False,
) -> Tally:
    """Simulate each seed and count; `seeds` may be without an end.

    num_ranks: instead of what each seed draws; processes: by default one for each core
    on_progress: called after every few seeds
    """
    tally, started = Tally(), time.monotonic()
    batches = _batches(seeds)
    workers = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=gc.set_threshold, initargs=(COLLECT_AFTER,)
    ) as pool:
        running = {
            pool.submit(_run_batch, batch, num_ranks) for batch in itertools.islice(batches, 2 * workers)
        }
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                for result in future.result():
                    tally.add(result)
            tally.seconds = time.monotonic() - started
            on_progress(tally)
            if stop_at_failure and tally.failures:
                pool.shutdown(cancel_futures=True)
                break
            running |= {
                pool.submit(_run_batch, batch, num_ranks) for batch in itertools.islice(batches, len(done))
            }
    return tally


def _batches(seeds: Iterable[int]) -> Iterable[list[int]]:
    rest = iter(seeds)
    while batch := list(itertools.islice(rest, SEEDS_PER_TASK)):
        yield batch


def _run_batch(seeds: list[int], num_ranks: int | None) -> list[Result]:
    from eplb_platform.testing.cluster.scenario import draw_scenario

    return [simulate(draw_scenario(seed, num_ranks)) for seed in seeds]
