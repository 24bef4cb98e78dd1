"""Weights that move between real processes: after every chunk each slot holds what the map shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch.distributed import Store

from eplb_backends.cpu import CpuBackend
from eplb_platform.backend import Message
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Chunk, Schedule, build_schedule
from eplb_platform.migration.staging import Staging
from eplb_platform.migration.transfer import ChecksumError, MigrationError, Migrator
from eplb_platform.testing.processes import RankPool
from eplb_platform.topology import Topology

pytestmark = pytest.mark.processes

NUM_RANKS, NUM_LAYERS, NUM_LOGICAL, SLOTS = 4, 3, 10, 4
TOPOLOGY = Topology(NUM_RANKS, num_nodes=2)
Weights = list[list[torch.Tensor | list[torch.Tensor]]]


def random_maps(seed: int) -> tuple[ExpertMap, ExpertMap]:
    rng = np.random.default_rng(seed)
    spare = NUM_RANKS * SLOTS - NUM_LOGICAL

    def layer() -> np.ndarray:
        return rng.permutation(
            np.concatenate([np.arange(NUM_LOGICAL), rng.integers(NUM_LOGICAL, size=spare)])
        )

    old, new = (
        ExpertMap(np.stack([layer() for _ in range(NUM_LAYERS)]), NUM_LOGICAL, TOPOLOGY) for _ in "on"
    )
    return old, new


def tagged_expert(layer: int, expert: int) -> list[torch.Tensor]:
    """Tensors that no other expert has: float32, bfloat16 and int8 of several shapes."""
    tag = layer * NUM_LOGICAL + expert
    generator = torch.Generator().manual_seed(tag)
    return [
        torch.randn(16, 24, generator=generator),
        torch.randn(33, generator=generator).to(torch.bfloat16),
        torch.full((2, 3), tag, dtype=torch.int8),
    ]


def weights_of(expert_map: ExpertMap, rank: int, *, stacked: bool) -> Weights:
    layers: Weights = []
    for layer in range(expert_map.num_layers):
        experts = [tagged_expert(layer, expert) for expert in expert_map.by_rank()[layer, rank].tolist()]
        parameters = [list(tensors) for tensors in zip(*experts, strict=True)]
        layers.append([torch.stack(tensors) if stacked else tensors for tensors in parameters])
    return layers


def assert_follow(weights: Weights, expert_map: ExpertMap, rank: int) -> None:
    for layer, slot in itertools.product(range(expert_map.num_layers), range(expert_map.slots_per_rank)):
        expected = tagged_expert(layer, int(expert_map.by_rank()[layer, rank, slot]))
        for parameter, tensor in zip(weights[layer], expected, strict=True):
            assert torch.equal(parameter[slot], tensor), f"layer {layer}, rank {rank}, slot {slot}"


class Corrupting(CpuBackend):
    """Rank 1 sends one flipped bit: the first message of its first exchange of weights."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        if self._rank == 1 and sends and sends[0].tensor.dtype == torch.float32:
            damaged = sends[0].tensor.clone()
            damaged.view(torch.int32).view(-1)[7] ^= 1
            sends = [Message(sends[0].peer, damaged), *sends[1:]]
        super().exchange(sends, receives)


def connected(kind: type[CpuBackend], store: Store, rank: int) -> CpuBackend:
    backend = kind()
    backend.connect(store, rank, NUM_RANKS, timeout_s=120.0)
    return backend


def schedule_of(old: ExpertMap, new: ExpertMap, staging: Staging, layers_per_chunk: int) -> Schedule:
    return build_schedule(old, new, layers_per_chunk=layers_per_chunk, staging_slots=staging.slots)


def migrate(
    rank: int, num_ranks: int, store: Store, seed: int, stacked: bool, slots: int, verify: bool
) -> tuple[int, int, int, int, tuple[int, ...]]:
    """Returns experts received and copied, bytes received, chunks, skipped layers."""
    old, new = random_maps(seed)
    backend = connected(CpuBackend, store, rank)
    weights = weights_of(old, rank, stacked=stacked)
    addresses = [
        parameter[slot].data_ptr() for layer in weights for parameter in layer for slot in range(SLOTS)
    ]
    expert_bytes = sum(tensor.nbytes for tensor in tagged_expert(0, 0))
    staging = Staging(backend, weights, max_bytes=slots * expert_bytes, layers_per_chunk=2)
    assert staging.slots == slots
    migrator = Migrator(backend, weights, staging, rank, verify=verify)
    schedule = schedule_of(old, new, staging, layers_per_chunk=2)
    before = old
    for chunk in schedule.chunks:
        migrator.fetch(chunk)
        migrator.verify(chunk)
        assert_follow(weights, before, rank)  # nothing changes before the swap
        migrator.swap(chunk)
        assert_follow(weights, chunk.map_after, rank)
        before = chunk.map_after
    assert before == new.replace_layers(schedule.skipped_layers, old)
    assert addresses == [
        parameter[slot].data_ptr() for layer in weights for parameter in layer for slot in range(SLOTS)
    ]
    assert migrator.bytes_received == migrator.experts_received * expert_bytes
    backend.close()
    return (
        migrator.experts_received,
        migrator.experts_copied,
        migrator.bytes_received,
        len(schedule.chunks),
        schedule.skipped_layers,
    )


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS, timeout_s=300.0) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("seed", "stacked", "slots", "verify"),
    [
        (0, True, 8, False),
        (1, False, 8, True),
        (2, True, 2, True),  # too small for one layer: it goes through maps in between
        (3, False, 2, False),
        (4, True, 1, False),
        (5, False, 3, True),
    ],
)
def test_every_slot_follows_the_map(
    pool: RankPool, seed: int, stacked: bool, slots: int, verify: bool
) -> None:
    results = pool.run(migrate, seed, stacked, slots, verify)
    old, new = random_maps(seed)
    schedule = build_schedule(old, new, layers_per_chunk=2, staging_slots=slots)
    moves = sum(received + copied for received, copied, *_ in results)
    assert moves == schedule.num_moves
    assert sum(received for received, *_ in results) == sum(c.sends_by_rank().sum() for c in schedule.chunks)
    assert {result[3:] for result in results} == {(len(schedule.chunks), schedule.skipped_layers)}
    if slots < SLOTS:
        assert len(schedule.chunks) > NUM_LAYERS


def corrupted(rank: int, num_ranks: int, store: Store, verify: bool) -> str:
    """The error that this rank sees, or nothing; its weights are checked to be the old ones."""
    old, new = random_maps(6)
    backend = connected(Corrupting, store, rank)
    weights = weights_of(old, rank, stacked=True)
    staging = Staging(backend, weights, max_bytes=None, layers_per_chunk=NUM_LAYERS)
    migrator = Migrator(backend, weights, staging, rank, verify=verify)
    (chunk,) = schedule_of(old, new, staging, layers_per_chunk=NUM_LAYERS).chunks
    error = ""
    try:
        migrator.fetch(chunk)
        migrator.verify(chunk)
    except ChecksumError as raised:
        error = str(raised)
        with pytest.raises(MigrationError):
            migrator.swap(chunk)
    assert_follow(weights, old, rank)
    backend.close()
    return error


def test_a_corrupted_message_is_caught_and_named(pool: RankPool) -> None:
    old, new = random_maps(6)
    (chunk,) = build_schedule(old, new, layers_per_chunk=NUM_LAYERS, staging_slots=100).chunks
    damaged = chunk.sends_of(1)
    receiver = int(damaged.peer[0])
    errors = pool.run(corrupted, True)
    assert errors == [errors[0]] * NUM_RANKS  # so that no rank goes on
    assert errors[0].startswith(
        f"layer {damaged.layer[0]}, logical expert {damaged.expert[0]}: "
        f"rank {receiver} received other weights than rank 1 read"
    )
    assert pool.run(corrupted, False) == [""] * NUM_RANKS  # the damage goes unseen where nobody looks


def misused(rank: int, num_ranks: int, store: Store) -> list[str]:
    """Chunks handed over at the wrong time, then a fetched chunk that is never committed."""
    old, new = random_maps(7)
    backend = connected(CpuBackend, store, rank)
    weights = weights_of(old, rank, stacked=False)
    staging = Staging(backend, weights, max_bytes=None, layers_per_chunk=1)
    migrator = Migrator(backend, weights, staging, rank)
    first, second, *_ = schedule_of(old, new, staging, layers_per_chunk=1).chunks
    too_large = build_schedule(old, new, layers_per_chunk=NUM_LAYERS, staging_slots=100).chunks[0]
    errors = [error_of(migrator, "swap", first), error_of(migrator, "fetch", too_large)]
    migrator.fetch(first)
    errors.append(error_of(migrator, "swap", second))
    migrator.fetch(second)  # the first was given up
    errors.append(error_of(migrator, "swap", first))
    assert_follow(weights, old, rank)
    migrator.swap(second)
    assert_follow(weights, old.replace_layers(second.layers, new), rank)
    backend.close()
    return errors


def error_of(migrator: Migrator, method: str, chunk: Chunk) -> str:
    with pytest.raises(MigrationError) as raised:
        getattr(migrator, method)(chunk)
    return str(raised.value)


def test_a_chunk_that_is_not_staged_is_not_swapped(pool: RankPool) -> None:
    for rank, errors in enumerate(pool.run(misused)):
        assert errors[0] == f"rank {rank}: swap of layers [0], but nothing is staged"
        assert errors[1].startswith(f"rank {rank}: ")
        assert "but the staging holds 4" in errors[1]
        assert errors[2] == f"rank {rank}: swap of layers [1], but layers [0] are staged"
        assert errors[3] == f"rank {rank}: swap of layers [0], but layers [1] are staged"
