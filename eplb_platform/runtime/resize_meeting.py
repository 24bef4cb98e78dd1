"""How ranks agree on who is active: a meeting to which some may not come, because they died or are new.

Attempts are numbered places of the store, each with one verdict that stands for ever: a rank that was started
later reads its way through them. The lowest rank that has weights and is to stay looks who has come, and
writes the verdict; a rank that waits too long for it writes that there is none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from eplb_platform.runtime.agreement import FIRST_POLL_S, SLOWEST_POLL_S
from eplb_platform.runtime.gate import ForwardStopped

if TYPE_CHECKING:
    from eplb_platform.runtime.cycle import RankLink
    from eplb_platform.runtime.ports import ControlPlane

LEADER_TIMEOUTS = 2.0
"""The verdict is waited for this many times as long as a rank."""


class ResizeError(RuntimeError):
    """The active ranks are what they were. One line, with the rank and the reason; `resize` may be called
    again.

    gone: ranks without which the others went on, since they are dead or did not come in time. They take no
        part any more even if they live: the next call leaves them out, or lets them join
    """

    def __init__(self, line: str, gone: Sequence[int] = ()) -> None:
        self.gone = tuple(gone)
        super().__init__(line)


@dataclass(frozen=True)
class Presence:
    """What a rank brings: its place in each count of passes, and what must be the same on every rank."""

    incarnation: int
    is_member: bool
    """Whether it has the weights that the map says."""
    active_ranks: list[int]
    dead: list[int] | None
    model: list[int]
    """Layers, physical experts, logical experts, ranks, nodes."""
    can_load: bool
    epoch: int = 0
    boundary: int = 0
    passes: int = 0
    traced: int = 0
    cycle: int = 0


@dataclass(frozen=True)
class Verdict:
    """What all ranks that read it act on. Without `reason`: agreed."""

    active_ranks: list[int]
    reason: str = ""
    before: tuple[int, ...] = ()
    """The active ranks until now."""
    incarnation_of: dict[str, int] | None = None
    """Of each rank that takes part."""
    members: tuple[int, ...] = ()
    """Ranks that take part and have their weights."""
    can_load: bool = False
    """Whether every rank that stays or joins can load experts from the checkpoint."""
    epoch: int = 0
    boundary: int = 0
    passes: int = 0
    traced: int = 0
    cycle: int = 0

    @classmethod
    def parse(cls, text: str) -> Verdict:
        fields = json.loads(text)
        return cls(**{**fields, "before": tuple(fields["before"]), "members": tuple(fields["members"])})

    def text(self) -> str:
        return json.dumps(asdict(self))

    @cached_property
    def present(self) -> list[int]:
        """The ranks that take part, ascending."""
        return sorted(int(rank) for rank in self.incarnation_of or ())

    @cached_property
    def staying(self) -> list[int]:
        """Ranks that are active before and after."""
        return [rank for rank in self.members if rank in self.active_ranks]

    @cached_property
    def joining(self) -> list[int]:
        """Active ranks that have no weights yet."""
        return [rank for rank in self.active_ranks if rank not in self.members]

    @cached_property
    def dead(self) -> list[int]:
        """Ranks whose weights are gone."""
        return [rank for rank in self.before if rank not in self.members]

    def includes(self, rank: int, incarnation: int) -> bool:
        """Whether this very process takes part."""
        return (self.incarnation_of or {}).get(str(rank)) == incarnation


class ResizeMeetings:
    """This rank's part in the attempts, of which every rank sees the same.

    plane: used by the forward thread only
    """

    def __init__(self, plane: ControlPlane, link: RankLink) -> None:
        self.plane = plane
        self._link = link
        self._incarnation = 0
        self._number = 0
        self._was_left_out = False
        self._stale: Sequence[str] = ()

    async def incarnation(self) -> int:
        """The number of this process among those that this rank has had. Raises `ForwardStopped` when this
        rank cannot learn it.
        """
        rank = self._link.rank
        try:
            self._incarnation = self._incarnation or await self.plane.count(f"resize/incarnation/{rank}")
        except Exception as error:
            raise ForwardStopped(f"resize: rank {rank} cannot reach the store: {error}") from error
        return self._incarnation

    async def is_left_out(self, plane: ControlPlane) -> bool:
        """Whether others have agreed on active ranks without this process. Any thread, by its own client."""
        number = self._number
        while (text := await plane.read(f"resize/{number}")) is not None:
            if self._leaves_out(Verdict.parse(text)):
                return True
            number += 1
        return self._was_left_out

    def _leaves_out(self, verdict: Verdict) -> bool:
        return not verdict.reason and not verdict.includes(self._link.rank, self._incarnation)

    def forget_later(self, keys: Sequence[str]) -> None:
        """Keys of the attempt that was held last; a rank that leaves may still read them."""
        self._stale = [*self._stale, *keys]

    @property
    def scope(self) -> str:
        """Of what belongs to the attempt that was held last."""
        return f"resize/{self._number - 1}"

    @property
    def generation(self) -> int:
        """The number of the attempt that was held last, from 1."""
        return self._number

    async def hold(self, presence: Presence, before: Sequence[int], timeout_s: float) -> Verdict:
        """Wait for the verdict of the first attempt that is not over; it may be that this rank is left out.

        before: the active ranks until now; none where this rank is not one of them
        Raises `ResizeError` on every rank that comes when an active rank does not within `timeout_s`
        seconds or means something else; `ForwardStopped` when this rank cannot learn the verdict.
        """
        deadline = self._link.clock.now() + LEADER_TIMEOUTS * timeout_s
        try:
            while True:
                place = f"resize/{self._number}"
                known = await self.plane.read(place)
                text = known or await self._wait(place, presence, before, timeout_s, deadline)
                verdict = Verdict.parse(text)
                if not verdict.reason:
                    self._was_left_out = self._leaves_out(verdict)
                self._number += 1
                if not verdict.reason:
                    if presence.is_member or verdict.includes(self._link.rank, presence.incarnation):
                        return verdict
                elif _is_about(verdict, presence, took_part=known is None):
                    raise ResizeError(f"resize: {verdict.reason}; the active ranks are what they were")
        except ResizeError:
            raise
        except Exception as error:
            rank = self._link.rank
            raise ForwardStopped(f"resize: rank {rank} cannot learn the verdict: {error}") from error

    async def _wait(
        self, place: str, presence: Presence, before: Sequence[int], timeout_s: float, deadline: float
    ) -> str:
        clock, started, pause = self._link.clock, self._link.clock.now(), FIRST_POLL_S
        await self.plane.forget(self._stale)
        own = f"{place}/{self._link.rank}/{presence.incarnation}"
        self._stale = [own, f"{place}/{self._link.rank}"]
        await self.plane.settle(own, json.dumps(asdict(presence)))
        await self.plane.settle(self._stale[1], str(presence.incarnation))
        roll = _Roll(self.plane, place, presence, before, self._link.rank)
        while (known := await self.plane.read(place)) is None:
            now = clock.now()
            verdict = await roll.call(is_late=now - started > timeout_s)
            if verdict is None and now > deadline:
                waiting = f"rank {self._link.rank}: no verdict within {deadline - started:g} s"
                verdict = Verdict(presence.active_ranks, waiting)
            if verdict is not None:
                return await self.plane.settle(place, verdict.text())
            await clock.sleep(pause)
            pause = min(pause * 1.5, SLOWEST_POLL_S)
        return known


def _is_about(refusal: Verdict, presence: Presence, *, took_part: bool) -> bool:
    """Whether a rank acts on a refusal: of its own wish, for a member also of others' while it was there."""
    is_same = refusal.active_ranks == presence.active_ranks
    return is_same or took_part if presence.is_member else is_same and took_part


class _Roll:
    """Who has come to an attempt, as one rank sees it; each call reads few keys."""

    def __init__(
        self, plane: ControlPlane, place: str, own: Presence, before: Sequence[int], rank: int
    ) -> None:
        self._plane = plane
        self._place = place
        self._before = list(before)
        self._own = own
        self._rank = rank
        self._came: dict[int, Presence] = {rank: own}
        self._candidates = [r for r in self._before if r in own.active_ranks and r not in (own.dead or ())]
        self._awaited = sorted({*self._before, *own.active_ranks} - set(own.dead or ()) - {rank})

    async def call(self, *, is_late: bool) -> Verdict | None:
        """The verdict, once it is this rank's to write."""
        if not self._own.is_member or not await self._leads():
            return None
        while self._awaited and await self._has_come(self._awaited[0]):
            del self._awaited[0]
        if not self._awaited:
            return self._decide()
        if not is_late:
            return None
        missing = [rank for rank in self._awaited if not await self._has_come(rank)]
        needed = [r for r in missing if r in self._own.active_ranks or self._own.dead is not None]
        if needed:
            return self._refuse(f"rank {', '.join(map(str, needed))} did not come in time")
        return self._decide()

    async def _leads(self) -> bool:
        """Whether no lower rank that stays has weights: then it is this one that decides."""
        while self._candidates and self._candidates[0] != self._rank:
            if not await self._has_come(self._candidates[0]) or self._came[self._candidates[0]].is_member:
                return False
            del self._candidates[0]
        return bool(self._candidates)

    async def _has_come(self, rank: int) -> bool:
        if rank in self._came:
            return True
        incarnation = await self._plane.read(f"{self._place}/{rank}")
        text = incarnation and await self._plane.read(f"{self._place}/{rank}/{incarnation}")
        if not text:
            return False
        self._came[rank] = Presence(**json.loads(text))
        return True

    def _refuse(self, reason: str) -> Verdict:
        return Verdict(self._own.active_ranks, reason)

    def _decide(self) -> Verdict:
        came = self._came
        for rank, presence in sorted(came.items()):
            for what, theirs, ours in (
                ("the active ranks", presence.active_ranks, self._own.active_ranks),
                ("the model [layers, slots, experts, ranks, nodes]", presence.model, self._own.model),
            ):
                if theirs != ours:
                    return self._refuse(f"{what}: rank {rank} has {theirs}, rank {self._rank} {ours}")
        members = tuple(
            rank for rank in sorted(came) if came[rank].is_member and rank not in (self._own.dead or ())
        )
        going_on = [came[rank] for rank in self._own.active_ranks]
        return Verdict(
            self._own.active_ranks,
            before=tuple(self._before),
            incarnation_of={str(rank): presence.incarnation for rank, presence in came.items()},
            members=members,
            can_load=all(presence.can_load for presence in going_on),
            epoch=max(presence.epoch for presence in came.values()) + 2,  # a cycle may take one more yet
            boundary=max(presence.boundary for presence in going_on),
            passes=max(presence.passes for presence in going_on),
            traced=max(presence.traced for presence in going_on),
            cycle=max(presence.cycle for presence in going_on),
        )
