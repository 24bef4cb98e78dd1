"""Experts move between real processes over gloo while simulated streams run late, beside passes that read.

The whole shared path of accelerators at once: a background thread fetches, the forward thread goes on
enqueuing passes and swaps. Processes and threads are real, streams are not; nothing here is about a device's
numbers, memory or time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from torch.distributed import Store

from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Chunk, build_schedule
from eplb_platform.migration.staging import Staging
from eplb_platform.migration.transfer import Migrator
from eplb_platform.testing.processes import RankPool
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams
from tests.processes.test_migration import NUM_RANKS, assert_follow, random_maps, weights_of
from tests.simulated_backend import SimulatedBackend

pytestmark = pytest.mark.processes

SEEDS = 30


class DoesNotWait(SimulatedStreams):
    def wait(self, mark: object) -> None:
        pass


def migrate_beside_passes(
    rank: int, num_ranks: int, store: Store, seeds: range, kind: type[SimulatedStreams]
) -> list[str]:
    """What passes saw that they should not have, over all seeds."""
    backend = SimulatedBackend(pinned_bytes=1 << 14)
    backend.connect(store, rank, num_ranks, timeout_s=120.0)
    faults = [fault for seed in seeds for fault in migrate_once(backend, rank, seed, kind)]
    backend.close()
    return faults


def migrate_once(backend: SimulatedBackend, rank: int, seed: int, kind: type[SimulatedStreams]) -> list[str]:
    device = SimulatedDevice(seed * NUM_RANKS + rank)
    streams = kind(device)
    backend.use(streams)
    old, new = random_maps(seed)
    weights = weights_of(old, rank, stacked=seed % 2 == 0)
    faults: list[str] = []

    def read_weights(expected: ExpertMap) -> None:
        try:
            assert_follow(weights, expected, rank)
        except AssertionError as error:
            faults.append(str(error))

    def enqueue_pass(expert_map: ExpertMap) -> None:
        streams.launch(lambda: read_weights(expert_map))

    staging = Staging(backend, weights, max_bytes=None, layers_per_chunk=1)
    migrator = Migrator(backend, weights, staging, rank, verify=seed % 3 == 0)
    current = old
    for chunk in build_schedule(old, new, layers_per_chunk=1, staging_slots=staging.slots).chunks:
        enqueue_pass(current)
        background = threading.Thread(target=fetch_and_verify, args=(migrator, chunk))
        background.start()
        enqueue_pass(current)
        background.join()
        migrator.swap(chunk)
        current = chunk.map_after
        enqueue_pass(current)
    device.finish()
    assert current == new
    return faults


def fetch_and_verify(migrator: Migrator, chunk: Chunk) -> None:
    migrator.fetch(chunk)
    migrator.verify(chunk)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as ranks:
        yield ranks


def test_no_pass_sees_weights_that_its_map_does_not_name(pool: RankPool) -> None:
    assert pool.run(migrate_beside_passes, range(SEEDS), SimulatedStreams) == [[]] * NUM_RANKS


def test_passes_do_see_them_where_streams_do_not_wait(pool: RankPool) -> None:
    assert any(pool.run(migrate_beside_passes, range(5), DoesNotWait))
