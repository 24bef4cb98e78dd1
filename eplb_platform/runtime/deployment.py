"""Deployment: the weights are moved to a given expert map before the model serves its first token.

No pass runs meanwhile, so chunks follow each other without a common step. Whatever goes wrong on one rank
stops all of them: a model that is half deployed routes tokens to the wrong experts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eplb_platform.balance import moved_experts
from eplb_platform.expert_map import ExpertMap
from eplb_platform.migration.schedule import Schedule, ScheduleError, build_schedule
from eplb_platform.migration.staging import BYTES_PER_MB
from eplb_platform.runtime.agreement import Agreement, CycleAborted, Digestible, fingerprint, same
from eplb_platform.runtime.ports import Group
from eplb_platform.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable

    from eplb_platform.migration.transfer import Migrator
    from eplb_platform.runtime.served_model import ServedModel

logger = logging.getLogger(__name__)


class DeploymentError(RuntimeError):
    """An expert map cannot be deployed: no rank may serve. One line, with the rank and the reason."""


@dataclass(frozen=True)
class Deployment:
    """Moves a model's weights from the map they follow to another one, on every rank together.

    configuration: must be the same on every rank
    make_migrator: called once, only where something is to move; its staging is freed with it unless the
        caller keeps it.
    make_group: the group over which that migrator moves experts
    """

    model: ServedModel
    configuration: Digestible
    places: Agreement
    """Apart from those of the cycles."""
    rank: int
    layers_per_chunk: int
    timeout_s: float
    make_migrator: Callable[[], Migrator]
    make_group: Callable[[Migrator], Group]

    async def run(self, current: ExpertMap, target: ExpertMap | None) -> ExpertMap:
        """Move everything from `current` to `target` and route by it; returns the map now in force.

        Every rank calls it, those that deploy nothing with None: that all ranks start with one configuration
        and from one map is compared then too. Raises `DeploymentError` on all ranks when one of them fails.
        """
        goal = current if target is None else _on_nodes_of(target, current.topology)
        await self._meet(
            "configuration",
            "eplb_config is not the same on every rank",
            fingerprint(self.configuration),
        )
        await self._meet("maps", "the ranks do not start from one expert map", fingerprint(current, goal))
        if goal == current:
            return current
        group: Group | None = None
        try:
            migrator = self.make_migrator()
            group = self.make_group(migrator)
            await self._move(current, goal, migrator, group)
        except Exception as error:
            reason = await self._announce(error)
            if group is not None:
                group.abort()
            raise DeploymentError(f"the expert map cannot be deployed: {reason}") from error
        await self._meet("deployed", "the expert map cannot be deployed", fingerprint(goal))
        return goal

    async def _meet(self, place: str, fault: str, offer: int) -> None:
        try:
            await self.places.agree(place, offer, same, timeout_s=self.timeout_s)
        except CycleAborted as aborted:
            raise DeploymentError(f"{fault}: {aborted}") from aborted

    async def _move(self, current: ExpertMap, goal: ExpertMap, migrator: Migrator, group: Group) -> None:
        schedule = self._schedule(current, goal, migrator.staging.slots)
        for chunk in schedule.chunks:
            await group.fetch(chunk)
            migrator.swap(chunk)
            self.model.apply_map(chunk.layers, chunk.map_after)
        logger.info(
            "rank %d: expert map deployed: %d experts moved in %d chunks, %.1f MB received here",
            self.rank, moved_experts(current, goal).sum(), len(schedule.chunks),
            migrator.bytes_received / BYTES_PER_MB,
        )  # fmt: skip

    def _schedule(self, current: ExpertMap, goal: ExpertMap, staging_slots: int) -> Schedule:
        schedule = build_schedule(
            current, goal, layers_per_chunk=self.layers_per_chunk, staging_slots=staging_slots
        )
        if schedule.skipped_layers:
            raise ScheduleError(
                f"layers {list(schedule.skipped_layers)}: staging for {staging_slots} experts is too small "
                "for their moves, and no valid maps lie in between: raise staging_memory_mb"
            )
        return schedule

    async def _announce(self, error: Exception) -> str:
        """Tell the others before what is pending ends: the reason they see is the true one."""
        reason = f"rank {self.rank}: {type(error).__name__}: {error}"
        try:
            reason = str(await self.places.announce_failure(reason))
        except Exception as lost:
            logger.error("rank %d: cannot tell the other ranks: %s", self.rank, lost)
        return reason


def _on_nodes_of(target: ExpertMap, topology: Topology) -> ExpertMap:
    """`target` with the group's nodes, of which a file says nothing."""
    given = target.topology
    if given.num_ranks != topology.num_ranks or given.num_nodes == topology.num_nodes:
        return target
    nodes = Topology(given.num_ranks, topology.num_nodes, given.active_ranks)
    return ExpertMap(target.physical_to_logical, target.num_logical_experts, nodes)
