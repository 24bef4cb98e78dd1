"""The forward threads of all ranks meet between two passes, to do together what no cycle may do.

While they are met no rank passes a boundary. What was decided is one verdict in the store: either all ranks
are met, or none is, and a rank that comes after its time learns that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eplb_platform.runtime.agreement import Agreement, CycleAborted, same
from eplb_platform.runtime.gate import ForwardStopped
from eplb_platform.runtime.ports import ControlPlane

if TYPE_CHECKING:
    from eplb_platform.runtime.cycle import RankLink

NUMBER_BITS = 64


class MeetingFailed(RuntimeError):
    """Not all ranks came in time, or they came for different things: nothing was changed on any rank."""


class ForwardMeetings:
    """This rank's part in the meetings of all forward threads; each rank holds them in the same order.

    plane: used by the forward thread only
    """

    def __init__(self, plane: ControlPlane, link: RankLink) -> None:
        self.plane = plane
        self._link = link
        self._held = 0
        self._stale: Sequence[str] = ()

    async def start_anew(self) -> None:
        """The members of the link are others now, and have all left the meetings before."""
        stale, self._held, self._stale = self._stale, 0, ()
        await self.plane.forget(stale)

    async def hold(self, purpose: str, content: str, number: int, timeout_s: float) -> int:
        """Wait for every rank to come; returns the largest `number` that a rank brought.

        purpose, content: must be the same on every rank
        Raises `MeetingFailed`, on every rank that comes, when one of them does not within `timeout_s`
        seconds or means something else; `ForwardStopped` when this rank cannot learn the verdict.
        """
        place = f"{self._held}"
        link = self._link
        meeting = Agreement(
            self.plane, link.clock, scope=link.scope("meeting"), rank=link.rank, ranks=link.members
        )
        self._held += 1
        offer = _fingerprint(purpose, content) << NUMBER_BITS | number
        try:
            number = await meeting.decide(place, offer, _one_content, timeout_s=timeout_s)
            await self.plane.forget(self._stale)  # all ranks have left the meeting before
            return number
        except CycleAborted as aborted:
            raise MeetingFailed(f"{purpose}: {aborted}; nothing was changed on any rank") from aborted
        except Exception as error:
            raise ForwardStopped(
                f"{purpose}: rank {link.rank} cannot learn whether all ranks came: {error}"
            ) from error
        finally:
            self._stale = meeting.keys


def _fingerprint(purpose: str, content: str) -> int:
    digest = hashlib.blake2b(f"{purpose} {content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _one_content(offers: Sequence[int]) -> int:
    same([offer >> NUMBER_BITS for offer in offers])
    return max(offer & ((1 << NUMBER_BITS) - 1) for offer in offers)
