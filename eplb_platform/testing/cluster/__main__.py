"""python -m eplb_platform.testing.cluster: one seed again, many seeds, or seeds without an end."""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time

from eplb_platform.testing.cluster.campaign import Tally, run_seeds
from eplb_platform.testing.cluster.scenario import draw_scenario
from eplb_platform.testing.cluster.simulation import simulate

REPORT_EVERY_S = 10.0


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when a rule was broken, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m eplb_platform.testing.cluster", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="run this seed")
    what.add_argument("--seeds", type=int, metavar="COUNT", help="run so many seeds, from --first on")
    what.add_argument("--soak", action="store_true", help="run seeds until stopped or until one fails")
    parser.add_argument("--first", type=int, help="the first seed (0; for --soak a random one)")
    parser.add_argument("--ranks", type=int, help="ranks in place of the 8 to 64 that a seed draws")
    parser.add_argument("--processes", type=int, help="one for each core by default")
    parser.add_argument("--trace", action="store_true", help="show what happened, with --seed")
    options = parser.parse_args(arguments)
    for name in ("seeds", "ranks", "processes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected a larger number")
    if options.seed is not None:
        return _one(options.seed, options.ranks, options.trace)
    if options.soak:
        first = random.SystemRandom().randrange(10**9) if options.first is None else options.first
        return _many(itertools.count(first), options, is_endless=True)
    first = options.first or 0
    return _many(range(first, first + options.seeds), options, is_endless=False)


def _one(seed: int, num_ranks: int | None, show: bool) -> int:
    result = simulate(draw_scenario(seed, num_ranks), keep_trace=show)
    if show:
        print("\n".join(result.trace))
    tally = Tally()
    tally.add(result)
    print("\n".join(tally.lines()[1:]))
    return int(bool(result.violations))


def _many(seeds: range | itertools.count[int], options: argparse.Namespace, *, is_endless: bool) -> int:
    reported = time.monotonic()

    def report(tally: Tally) -> None:
        nonlocal reported
        if is_endless and time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            print(tally.lines()[0], f"wrong tokens: {tally.wrong_tokens}", sep=", ", flush=True)

    try:
        tally = run_seeds(
            seeds,
            num_ranks=options.ranks,
            processes=options.processes,
            on_progress=report,
            stop_at_failure=is_endless,
        )
    except KeyboardInterrupt:
        return 0
    print("\n".join(tally.lines()))
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
