"""An import of the platform with one line changed, in a process of its own; the tree stays as it is."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from multiprocessing.connection import Connection
from types import CodeType, ModuleType

from tests.simulation.mutations import Mutation

SEEDS = 500
NUM_RANKS = 8


class _MutatedLoader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutation: Mutation) -> None:
        super().__init__(fullname, path)
        self._mutation = mutation

    def get_code(self, fullname: str) -> CodeType:
        return compile(mutated(self.get_source(fullname) or "", self._mutation), self.path, "exec")


class _Finder(MetaPathFinder):
    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._mutation.module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.origin is not None
        loader = _MutatedLoader(fullname, spec.origin, self._mutation)
        return importlib.util.spec_from_file_location(fullname, spec.origin, loader=loader)


def mutated(source: str, mutation: Mutation) -> str:
    """`source` with the line broken; raises ValueError unless it stands there exactly once."""
    found = source.count(mutation.line)
    if found != 1:
        raise ValueError(f"{mutation.module}: {mutation.line!r} stands there {found} times, expected once")
    return source.replace(mutation.line, mutation.broken)


def first_violation(mutation: Mutation, seeds: Sequence[int]) -> tuple[int, str] | None:
    """The first seed that notices, and what it says; None when none of `seeds` does."""
    context = multiprocessing.get_context("fork")  # what is slow to import is there already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_search, args=(mutation, seeds, sender))
    process.start()
    sender.close()
    try:
        found: tuple[int, str] | None = receiver.recv()
    finally:
        process.join()
    return found


def _search(mutation: Mutation, seeds: Sequence[int], answer: Connection) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "eplb_platform"]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder(mutation))
    from eplb_platform.testing.cluster import draw_scenario, simulate

    for seed in seeds:
        violations = simulate(draw_scenario(seed, NUM_RANKS)).violations
        if violations:
            answer.send((seed, violations[0]))
            return
    answer.send(None)
