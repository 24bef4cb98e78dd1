"""What all ranks compute from equal arguments, computed once: they share one process here.

Only functions of their arguments alone, whose results nobody changes: nothing else can tell the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from eplb_platform.balance import moved_experts
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.resized_map import resized_map
from eplb_platform.migration.schedule import Chunk, Schedule, build_schedule, resize_chunks
from eplb_platform.runtime import cycle, deployment, resizing
from eplb_platform.topology import Topology

Key = TypeVar("Key")
Value = TypeVar("Value")
Numbers = tuple[int, ...]

KEPT = 256


@contextmanager
def computed_once() -> Iterator[None]:
    """Schedules, maps made of a broadcast plan, maps for other active ranks, counts of moved experts."""
    receive = cycle._received_map
    maps: dict[tuple[bytes, Topology], ExpertMap] = {}
    schedules: dict[tuple[str, str, int, int], Schedule] = {}
    resized: dict[tuple[str, Topology, Numbers, Numbers], ExpertMap] = {}
    chunks: dict[tuple[str, str, Numbers, Numbers, int], tuple[Chunk, ...]] = {}
    counts: dict[tuple[str, str], NDArray[np.int64]] = {}

    def one_map(slots: NDArray[np.int64], like: ExpertMap) -> ExpertMap:
        return _remember(maps, (slots.tobytes(), like.topology), lambda: receive(slots, like))

    def one_schedule(
        old: ExpertMap, new: ExpertMap, *, layers_per_chunk: int, staging_slots: int
    ) -> Schedule:
        def build() -> Schedule:
            return build_schedule(old, new, layers_per_chunk=layers_per_chunk, staging_slots=staging_slots)

        return _remember(schedules, (old.digest(), new.digest(), layers_per_chunk, staging_slots), build)

    def one_resized_map(
        current: ExpertMap, topology: Topology, *, staying: list[int], joining: list[int]
    ) -> ExpertMap:
        def make() -> ExpertMap:
            return resized_map(current, topology, staying=staying, joining=joining)

        return _remember(resized, (current.digest(), topology, tuple(staying), tuple(joining)), make)

    def one_resize(
        current: ExpertMap, target: ExpertMap, *, living: list[int], staying: list[int], staging_slots: int
    ) -> tuple[Chunk, ...]:
        def build() -> tuple[Chunk, ...]:
            return resize_chunks(current, target, living=living, staying=staying, staging_slots=staging_slots)

        key = current.digest(), target.digest(), tuple(living), tuple(staying), staging_slots
        return _remember(chunks, key, build)

    def one_count(old: ExpertMap, new: ExpertMap) -> NDArray[np.int64]:
        return _remember(counts, (old.digest(), new.digest()), lambda: moved_experts(old, new))

    with (
        patch.object(cycle, "build_schedule", one_schedule),
        patch.object(deployment, "build_schedule", one_schedule),
        patch.object(resizing, "resize_chunks", one_resize),
        patch.object(resizing, "resized_map", one_resized_map),
        patch.object(cycle, "moved_experts", one_count),
        patch.object(deployment, "moved_experts", one_count),
        patch.object(cycle, "_received_map", one_map),
    ):
        yield


def _remember(kept: dict[Key, Value], key: Key, compute: Callable[[], Value]) -> Value:
    if key not in kept:
        if len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = compute()
    return kept[key]
