"""How all ranks agree without a collective: named places where each offers a number and the first verdict
stands.

A place holds one verdict, written by compare-and-set: `agreed N` by the rank that arrived last, or `failed
WHY` or `cancelled WHY` by any rank. A rank that has offered acts on the verdict and on nothing else, so all
ranks do the same. The key `end` of a cycle only carries the news to ranks that wait at other places; it
decides nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from eplb_platform.runtime.ports import Clock, ControlPlane
from eplb_platform.runtime.watchdog import Waiting

logger = logging.getLogger(__name__)

FIRST_POLL_S = 0.0005
SLOWEST_POLL_S = 0.01
LOOK_WHO_S = 1.0
"""A rank that waits longer looks who is missing."""
LOOKED_FOR = 32
"""Ranks that one rank looks for."""


class CycleAborted(RuntimeError):
    """The cycle ended before its end; the message says which rank ended it and why."""

    def __init__(self, reason: str, *, is_cancelled: bool) -> None:
        super().__init__(reason)
        self.is_cancelled = is_cancelled
        """A rank asked for the end (paused, closing); nothing failed."""


class Disagreement(ValueError):
    """Offers that must not differ do: those at `places` from the one at `first`, as they were given."""

    def __init__(self, places: Sequence[int], first: int = 0) -> None:
        super().__init__(f"offers {list(places)} differ from offer {first}")
        self.places = places
        self.first = first


def same(offers: Sequence[int]) -> int:
    """The one number that all ranks offered; raises `Disagreement` over those that differ from the first."""
    differing = [place for place, offer in enumerate(offers) if offer != offers[0]]
    if differing:
        raise Disagreement(differing)
    return offers[0]


class Digestible(Protocol):
    """What has a digest that is the same on every rank and machine for the same content."""

    def digest(self) -> str: ...


def fingerprint(*contents: Digestible) -> int:
    """63 bits, to be offered, that differ when two ranks mean different maps or tables."""
    digests = " ".join(content.digest() for content in contents)
    return int.from_bytes(hashlib.blake2b(digests.encode(), digest_size=8).digest(), "big") >> 1


class Agreement:
    """The places of one undertaking of all ranks, as one rank sees them.

    scope: keeps the places of this one apart from others': `cycle/7`
    ranks: who takes part, ascending
    is_ending: says why this rank wants the undertaking to end now, or nothing
    on_wait: is told now and then who is missing, while this rank waits long, and None when it goes on
    """

    def __init__(
        self,
        plane: ControlPlane,
        clock: Clock,
        *,
        scope: str,
        rank: int,
        ranks: Sequence[int],
        is_ending: Callable[[], str] = str,
        on_wait: Callable[[Waiting | None], None] | None = None,
    ) -> None:
        self._on_wait = on_wait
        self._plane = plane
        self._clock = clock
        self._prefix = scope
        self._rank = rank
        self._ranks = ranks
        self._is_first = rank == ranks[0]
        self._is_ending = is_ending
        self._end_key = f"{self._prefix}/end"
        self._keys = [self._end_key] if self._is_first else []

    @property
    def keys(self) -> Sequence[str]:
        """Keys that this rank deletes once every rank has left the cycle."""
        return self._keys

    async def agree(
        self,
        place: str,
        offer: int = 0,
        choose: Callable[[Sequence[int]], int] = max,
        *,
        timeout_s: float | None = None,
        is_ending: Callable[[], str] | None = None,
    ) -> int:
        """Offer a number, wait for every other rank's, and return what `choose` makes of them all.

        is_ending: in place of the undertaking's own

        Raises `CycleAborted` when any rank ended the cycle, or after `timeout_s` seconds (None waits without
        a
        limit: for places that ranks reach only as their forward passes go on, and an idle engine makes none).
        """
        key = f"{self._prefix}/{place}"
        own = f"{key}/{self._rank}"
        self._keys += [own, *((key, f"{key}/count") if self._is_first else ())]
        await self._plane.settle(own, str(offer))
        if await self._plane.count(f"{key}/count") == len(self._ranks):
            offers = await self._plane.read_all([f"{key}/{rank}" for rank in self._ranks])
            await self._plane.settle(key, self._verdict(offers, choose))
        return await self._learn(key, place, timeout_s, is_ending or self._is_ending)

    async def decide(
        self,
        place: str,
        offer: int = 0,
        choose: Callable[[Sequence[int]], int] = max,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """As `agree`, for a forward thread: an error on the way to the verdict ends the place for all ranks.

        Raises `CycleAborted`; any other error means that this rank cannot learn the verdict.
        """
        try:
            return await self.agree(place, offer, choose, timeout_s=timeout_s)
        except CycleAborted:
            raise
        except Exception as error:
            logger.warning("rank %d: %s/%s: %s; settling it", self._rank, self._prefix, place, error)
            return await self.settle_as_failed(place, f"rank {self._rank}: {error}")

    async def settle_as_failed(self, place: str, reason: str) -> int:
        """End a place whose verdict this rank failed to learn: returns the number if others had agreed
        first.
        """
        return self._act_on(await self._plane.settle(f"{self._prefix}/{place}", f"failed {reason}"))

    async def announce_failure(self, reason: str) -> CycleAborted:
        """Tell ranks that wait anywhere in this cycle that it is over; returns the end that stands."""
        return _ended(await self._plane.settle(self._end_key, f"failed {reason}"))

    async def announce_end(self, reason: str) -> None:
        """The same, where nothing failed."""
        await self._plane.settle(self._end_key, f"cancelled {reason}")

    async def _learn(
        self, key: str, place: str, timeout_s: float | None, is_ending: Callable[[], str]
    ) -> int:
        started, pause = self._clock.now(), FIRST_POLL_S
        next_look = started + LOOK_WHO_S
        while (verdict := await self._plane.read(key)) is None:
            if self._on_wait is not None and self._clock.now() > next_look:
                self._on_wait(Waiting(key, await self._missing(key)))
                next_look = self._clock.now() + max(LOOK_WHO_S, self._clock.now() - started)
            ending = await self._ending(place, started, timeout_s, is_ending())
            if ending is not None:
                verdict = await self._plane.settle(key, ending)
                break
            await self._clock.sleep(pause)
            pause = min(pause * 1.5, SLOWEST_POLL_S)
        if self._on_wait is not None and next_look > started + LOOK_WHO_S:
            self._on_wait(None)
        return self._act_on(verdict)

    async def _missing(self, key: str) -> list[int]:
        """The ranks that have made no offer, of the first and those behind this one: so all are looked for by
        some.
        """
        own = self._ranks.index(self._rank)
        behind = [self._ranks[(own + step) % len(self._ranks)] for step in range(1, LOOKED_FOR)]
        looked_for = sorted({self._ranks[0], *behind} - {self._rank})
        return [rank for rank in looked_for if await self._plane.read(f"{key}/{rank}") is None]

    async def _ending(self, place: str, started: float, timeout_s: float | None, wish: str) -> str | None:
        """The verdict that this rank would write for the place now, if any."""
        if wish:
            return await self._plane.settle(self._end_key, f"cancelled rank {self._rank}: {wish}")
        if (ending := await self._plane.read(self._end_key)) is not None:
            return ending
        if timeout_s is not None and self._clock.now() - started > timeout_s:
            return f"failed rank {self._rank}: not every rank reached {place!r} within {timeout_s:g} s"
        return None

    @staticmethod
    def _act_on(verdict: str) -> int:
        word, _, rest = verdict.partition(" ")
        if word != "agreed":
            raise _ended(verdict)
        return int(rest)

    def _verdict(self, offers: Sequence[str], choose: Callable[[Sequence[int]], int]) -> str:
        try:
            return f"agreed {choose([int(offer) for offer in offers])}"
        except Disagreement as found:
            differing = ", ".join(str(self._ranks[place]) for place in found.places)
            return f"failed rank {differing} differs from rank {self._ranks[found.first]}"


def _ended(verdict: str) -> CycleAborted:
    word, _, reason = verdict.partition(" ")
    return CycleAborted(reason, is_cancelled=word == "cancelled")
