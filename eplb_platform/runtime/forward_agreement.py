"""How the background threads bring their forward threads to do the same at the same boundary.

A forward thread acts without a wait. Whether it acted, and what became of it, the background thread asks.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from eplb_platform.runtime.actions import Action
from eplb_platform.runtime.agreement import Agreement, CycleAborted
from eplb_platform.runtime.gate import ActionsDropped

if TYPE_CHECKING:
    from eplb_platform.runtime.cycle import RankLink

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.002

ACTING_TIMEOUTS = 2.0
"""A forward thread that waits for others in an action ends that itself, after one time-out."""


class ForwardAgreement:
    """The actions of one cycle, as one rank's background thread sees them."""

    def __init__(self, link: RankLink, places: Agreement, *, margin_steps: int, timeout_s: float) -> None:
        self._link = link
        self._gate = link.gate
        self._places = places
        self._margin_steps = margin_steps
        self._timeout_s = timeout_s

    async def agree(self, place: str, action: Action, *, not_before: int = 0) -> None:
        """All ranks execute `action` at one boundary, `not_before` the given one, or none of them does."""
        self._gate.act_at(await self._agree_on_boundary(place, not_before), action)

    async def until_executed(self) -> None:
        """Wait until this rank's forward thread has executed the action, however long it takes no step.

        Raises what went wrong with it; `ActionsDropped` and `CycleAborted` when it was not executed.
        """
        gate, clock = self._gate, self._link.clock
        await clock.until(lambda: gate.is_acting or gate.has_acted or gate.is_closed)
        started = clock.now()
        while gate.is_acting:
            if clock.now() - started > ACTING_TIMEOUTS * self._timeout_s:
                raise TimeoutError(f"the forward thread is still at it after {clock.now() - started:.0f} s")
            await clock.sleep(LOOK_AGAIN_S)
        if gate.fault is not None:
            raise gate.fault
        if gate.was_executed:
            return
        if gate.is_dropping:
            raise ActionsDropped("no action of this cycle will be executed")
        raise CycleAborted(f"rank {self._link.rank}: closing", is_cancelled=True)

    async def execute_together(
        self, place: str, action: Action, complete: Callable[[], Awaitable[None]]
    ) -> None:
        """Have an action executed that needs the part of every rank, and `complete` it here.

        From the boundary on the others count on this rank: if it leaves, the cycle ends on all ranks, and the
        group of those that have begun.
        """
        await self.agree(place, action)
        try:
            await self.until_executed()
            await self._places.agree(
                f"{place}/executed",
                timeout_s=self._timeout_s,
                is_ending=lambda: "closing" if self._gate.is_closed else "",
            )
        except (CycleAborted, ActionsDropped) as ended:
            await self._leave(ended)
            raise
        await complete()

    async def _leave(self, ended: CycleAborted | ActionsDropped) -> None:
        try:
            if isinstance(ended, ActionsDropped) or ended.is_cancelled:
                await self._places.announce_end(str(ended))
            else:
                await self._places.announce_failure(str(ended))
        except Exception as error:
            logger.error("rank %d: cannot tell the other ranks: %s", self._link.rank, error)
        if self._gate.was_executed:
            self._link.break_group()

    async def _agree_on_boundary(self, place: str, not_before: int) -> int:
        """From the promise on, this rank acts on the verdict of `place` alone, or stops when it cannot learn
        it.
        """
        gate = self._gate
        offer = gate.promise(self._margin_steps, not_before)
        try:
            try:
                return await self._places.agree(place, offer, max, timeout_s=self._timeout_s)
            except CycleAborted:
                raise
            except Exception as error:
                logger.warning("rank %d: %s: %s; settling it", self._link.rank, place, error)
                return await self._places.settle_as_failed(place, f"rank {self._link.rank}: {error}")
        except CycleAborted:
            gate.release()
            raise
        except Exception as error:
            gate.fail(error)
            raise
