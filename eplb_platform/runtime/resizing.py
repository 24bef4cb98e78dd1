"""What all present ranks do once they have agreed on new active ranks: find the map, move the least, switch.

No forward pass runs meanwhile. Until the last agreement every rank can go back to the active ranks before;
what was moved by then was moved on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.resized_map import experts_without, resized_map
from eplb_platform.migration.schedule import Chunk, resize_chunks
from eplb_platform.runtime.agreement import Agreement, CycleAborted, Disagreement, fingerprint, same
from eplb_platform.runtime.gate import ForwardStopped
from eplb_platform.runtime.resize_meeting import ResizeError, Verdict
from eplb_platform.topology import Topology

if TYPE_CHECKING:
    from eplb_platform.runtime.cycle import RankLink
    from eplb_platform.runtime.ports import ControlPlane

logger = logging.getLogger(__name__)

NO_MAP = -1
SHOWN_EXPERTS = 12


class LostExpertsError(ResizeError):
    """Experts have no living replica, and nothing can load them.

    experts: (layer, logical expert) of each
    """

    def __init__(self, experts: Sequence[tuple[int, int]], gone: Sequence[int]) -> None:
        self.experts = tuple(experts)
        super().__init__(
            f"resize: {len(self.experts)} experts have no replica on a living rank (ranks {list(gone)} are "
            f"gone): {named(self.experts)}; give `load_expert`, or start the model anew",
            gone,
        )


def named(experts: Sequence[tuple[int, int]]) -> str:
    """`layer 0: experts 3, 7; layer 2: expert 1`, shortened when they are many."""
    by_layer: dict[int, list[int]] = {}
    for layer, expert in experts[:SHOWN_EXPERTS]:
        by_layer.setdefault(layer, []).append(expert)
    parts = [
        f"layer {layer}: expert{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}"
        for layer, ids in by_layer.items()
    ]
    more = len(experts) - SHOWN_EXPERTS
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


@dataclass
class Resizing:
    """One resize on one rank.

    plane: the forward thread's
    scope: keeps its places apart from others'
    model_map: for the shape, where this rank joins
    end_cycle: ends the running cycle, executes what was agreed, and returns the map in force
    make_staging: makes ready to move experts and returns how many can be staged
    swap: puts in place what was fetched for a chunk
    """

    link: RankLink
    plane: ControlPlane
    scope: str
    verdict: Verdict
    timeout_s: float
    model_map: ExpertMap
    end_cycle: Callable[[], Awaitable[ExpertMap]]
    make_staging: Callable[[], int]
    swap: Callable[[Chunk], None]

    def __post_init__(self) -> None:
        self._is_member = self.link.rank in self.verdict.members
        self._leader = self.verdict.staying[0]
        self._places = Agreement(
            self.plane,
            self.link.clock,
            scope=self.scope,
            rank=self.link.rank,
            ranks=self.verdict.present,
        )
        self.moved = 0
        """Experts that were moved or loaded, over all ranks."""
        self.loaded = 0
        self.has_group = False
        """Whether the group is now one of those that took part."""

    @property
    def keys(self) -> Sequence[str]:
        """Keys that this rank deletes at its next resize."""
        return self._places.keys

    async def run(self) -> ExpertMap:
        """Returns the map to route by from now on, on every rank that took part.

        Raises `ResizeError` on all of them when one fails; `ForwardStopped` when this rank cannot learn
        whether it did.
        """
        verdict, link = self.verdict, self.link
        try:
            current = await self.end_cycle() if self._is_member else None
            await self._agree("ended", NO_MAP if current is None else fingerprint(current), _one_map)
            moves = bool(await self._agree("moves", int(current is None or self._needs_moves(current))))
            link.epoch = verdict.epoch
            if moves:
                await link.group.rebuild(verdict.epoch, verdict.present)
                self.has_group = True
            current, target = await self._maps(current, moves)
            await self._agree("target", fingerprint(current, target), same)
            if moves:
                await self._move(current, target)
            await self._agree("done")
            return target
        except CycleAborted as aborted:
            self._give_up()
            raise self._refusal(str(aborted)) from aborted
        except Exception as error:
            await self._fail(error)

    def _needs_moves(self, current: ExpertMap) -> bool:
        """Raises `LostExpertsError` on every member."""
        lost = experts_without(
            current, [r for r in range(self.link.num_ranks) if r not in self.verdict.members]
        )
        if lost:
            names = named(lost)
            logger.error("rank %d: experts without a living replica: %s", self.link.rank, names)
            if not self.verdict.can_load:
                raise LostExpertsError(lost, self.verdict.dead)
        staying = self.verdict.staying
        leaving = [rank for rank in range(self.link.num_ranks) if rank not in staying]
        return bool(lost or self.verdict.joining or experts_without(current, leaving))

    async def _maps(self, current: ExpertMap | None, moves: bool) -> tuple[ExpertMap, ExpertMap]:
        """The map until now and the one to go on with; made on one rank where there is a group."""
        given, verdict = self.model_map, self.verdict
        topology = Topology(given.topology.num_ranks, given.topology.num_nodes, verdict.active_ranks)
        target = None
        if current is not None and (not moves or self.link.rank == self._leader):
            target = resized_map(current, topology, staying=verdict.staying, joining=verdict.joining)
        if current is not None and target is not None and not moves:
            return current, target
        tables = np.zeros((2, *given.physical_to_logical.shape), dtype=np.int64)
        if current is not None and target is not None:
            tables[:] = current.physical_to_logical, target.physical_to_logical
        tables = await self.link.group.broadcast(tables, self._leader)
        before = Topology(topology.num_ranks, topology.num_nodes, verdict.before)
        return (
            ExpertMap(tables[0], given.num_logical_experts, before),
            ExpertMap(tables[1], given.num_logical_experts, topology),
        )

    async def _move(self, current: ExpertMap, target: ExpertMap) -> None:
        """This is the forward thread, and all others are here: it enqueues exchanges where it has to."""
        link = self.link
        chunks = resize_chunks(
            current,
            target,
            living=self.verdict.members,
            staying=self.verdict.staying,
            staging_slots=await self._staging_slots(),
        )
        if link.group.enqueues_on_forward:
            link.group.open_exchange(self.verdict.epoch)
            link.open_epoch = self.verdict.epoch
        for index, chunk in enumerate(chunks):
            await self.link.group.fetch(chunk)
            chunk.map_after.derive_tables()
            await self._agree(f"chunk/{index}")
            self.swap(chunk)
            self.moved += chunk.num_moves
            self.loaded += int((chunk.source < 0).sum())

    async def _staging_slots(self) -> int:
        """Ranks that were started at different times may have room for different numbers."""
        return await self._agree("staging", self.make_staging(), min)

    async def _agree(self, place: str, offer: int = 0, choose: Callable[[Sequence[int]], int] = max) -> int:
        try:
            return await self._places.decide(place, offer, choose, timeout_s=self.timeout_s)
        except CycleAborted:
            raise
        except Exception as error:
            rank = self.link.rank
            raise ForwardStopped(
                f"resize: rank {rank} cannot learn what became of {place!r}: {error}"
            ) from error

    def _give_up(self) -> None:
        """The group that was made for this is of no use; the next cycle makes one of the ranks before."""
        self.link.break_group()

    async def _fail(self, error: Exception) -> NoReturn:
        """Tell the others first: the reason they see is the true one."""
        reason = f"rank {self.link.rank}: {type(error).__name__}: {error}"
        try:
            reason = str(await self._places.announce_failure(reason))
        except Exception as lost:
            logger.error("rank %d: cannot tell the other ranks: %s", self.link.rank, lost)
        self._give_up()
        if isinstance(error, ResizeError | ForwardStopped):
            raise error
        raise self._refusal(reason) from error

    def _refusal(self, reason: str) -> ResizeError:
        gone = self.verdict.dead
        but = f", but ranks {gone} are gone" if gone else ""
        return ResizeError(f"resize: {reason}; the active ranks are what they were{but}", gone)


def _one_map(offers: Sequence[int]) -> int:
    """The fingerprint that all ranks offered that have a map."""
    first = next(place for place, offer in enumerate(offers) if offer != NO_MAP)
    differing = [place for place, offer in enumerate(offers) if offer not in (NO_MAP, offers[first])]
    if differing:
        raise Disagreement(differing, first)
    return offers[first]
