"""Expert weights that say what they are: each slot holds a logical expert's number and the version of its
weights.

The real `Migrator` and `Staging` move them. What they use of a backend is here: memory, streams whose
operations run at once, and an exchange that reads the peers' memory at the moment of the transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_platform.backend import GroupError, Message, StreamOperations
from eplb_platform.expert_map import ExpertMap

if TYPE_CHECKING:
    from eplb_platform.migration.schedule import Chunk, RankMoves

EXPERT, VERSION = 0, 1
GONE = -7
CHECKSUM_FACTOR = 1_000_003


class TaggedWeights:
    """The weights of all ranks in one array, so that they are checked at once.

    tags: int64 [layers, ranks, slots, 2], expert and version of what each slot holds
    """

    def __init__(self, expert_map: ExpertMap) -> None:
        self.version = 1
        by_rank = expert_map.by_rank().astype(np.int64)
        self.tags = np.stack([by_rank, np.full_like(by_rank, self.version)], axis=-1)

    def of_rank(self, rank: int) -> list[list[torch.Tensor]]:
        """[layer][parameter], stacked tensors [slots, 2] that share the memory of `tags`."""
        return [[torch.from_numpy(layer[rank])] for layer in self.tags]

    def forget(self, rank: int) -> None:
        """What the rank holds is of no use any more."""
        self.tags[:, rank] = GONE

    def load(self, rank: int, expert_map: ExpertMap, version: int) -> None:
        """Write the rank's weights anew, in the places of `expert_map`."""
        self.tags[:, rank, :, EXPERT] = expert_map.by_rank()[:, rank]
        self.tags[:, rank, :, VERSION] = version


class _ImmediateStreams(StreamOperations):
    """A device that is never behind."""

    def transfer(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self) -> object:
        return self

    def wait(self, mark: object) -> None:
        pass

    def passed(self, mark: object) -> bool:
        return True

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)


class TagMemory:
    """One rank's memory, with the methods of `Backend` that moving weights needs.

    memories: those of all ranks
    corrupted: called when a fault changes what arrives
    """

    def __init__(
        self,
        rank: int,
        weights: Sequence[Sequence[torch.Tensor]],
        memories: Mapping[int, TagMemory],
        corrupted: Callable[[], None],
    ) -> None:
        self.streams: StreamOperations = _ImmediateStreams()
        self.arriving: Mapping[int, object] = {}
        """By rank, the chunk that each is transferring now."""
        self.verifies = False
        self.flip_next = False
        """A bit of the next expert that another rank sends arrives flipped."""
        self.has_changed = True
        """Whether weights were overwritten since somebody looked."""
        self.differences: NDArray[np.int64] = np.zeros(0, np.int64)
        """What this rank would add to the sum of all ranks."""
        self.total: NDArray[np.int64] | None = None
        self._prepared: tuple[Sequence[Message], Sequence[Message]] = ((), ())
        self._enqueued: tuple[Sequence[Message], Sequence[Message]] = ((), ())
        self._rank = rank
        self._weights = weights
        self._memories = memories
        self._corrupted = corrupted

    def allocate_staging(self, parameter: torch.Tensor, slots: int) -> Sequence[torch.Tensor]:
        return list(torch.full((slots, *parameter.shape[1:]), -1, dtype=parameter.dtype).unbind(0))

    def swap_in(
        self,
        parameter: torch.Tensor,
        slots: Sequence[int],
        staging: Sequence[torch.Tensor],
        rows: Sequence[int],
    ) -> None:
        self.has_changed = True
        target = parameter.numpy()
        for slot, row in zip(slots, rows, strict=True):
            target[slot] = staging[row].numpy()

    def checksum(self, tensors: Sequence[torch.Tensor]) -> int:
        return sum(value * CHECKSUM_FACTOR**place for place, value in enumerate(tensors[0].tolist()))

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Each pair's messages in their order; one that the peer does not send ends in a time-out."""
        offered: dict[int, Iterator[torch.Tensor]] = {}
        for message in receives:
            if message.peer not in offered:
                offered[message.peer] = self._memories[message.peer].messages_to(
                    self._rank, self.arriving[message.peer]
                )
            sent = next(offered[message.peer], None)
            if sent is None or sent.shape != message.tensor.shape:
                raise GroupError(f"rank {self._rank}: rank {message.peer} sends something else, or nothing")
            message.tensor.copy_(sent)
            if self.flip_next:
                self.flip_next = False
                message.tensor[0] ^= 1
                self._corrupted()

    def prepare_exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> TagMemory:
        self._prepared = sends, receives
        return self

    def enqueue(self) -> None:
        """The device does it later."""
        self._enqueued = self._prepared

    def finish_enqueued(self) -> None:
        """The device has done what was enqueued."""
        self.exchange(*self._enqueued)

    def sum_on_host(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        self.differences = values.copy()
        return np.zeros_like(values) if self.total is None else self.total

    def messages_to(self, rank: int, chunk: object) -> Iterator[torch.Tensor]:
        """What this rank sends to `rank` for the chunk that this rank is transferring."""
        moves: RankMoves = _chunk(chunk).sends_of(self._rank)
        mine = moves[np.flatnonzero(moves.peer == rank)]
        experts = [
            self._weights[layer][0][slot]
            for layer, slot in zip(mine.layer.tolist(), mine.slot.tolist(), strict=True)
        ]
        yield from experts


def _chunk(content: object) -> Chunk:
    from eplb_platform.migration.schedule import Chunk

    assert isinstance(content, Chunk)
    return content
