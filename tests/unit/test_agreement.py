"""Agreement between threads over a real in-process store: every rank acts on the one verdict of a place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from eplb_platform.runtime.agreement import Agreement, CycleAborted, same
from eplb_platform.runtime.ports import run_blocking
from eplb_platform.runtime.production import ThreadClock
from eplb_platform.runtime.store_plane import StoreControlPlane

NUM_RANKS = 4
TIMEOUT_S = 120.0


def join(
    store: HashStore, rank: int, is_ending: Callable[[], str] = str, num_ranks: int = NUM_RANKS
) -> Agreement:
    clock = ThreadClock(threading.Condition())
    return Agreement(
        StoreControlPlane(store),
        clock,
        scope="cycle/0",
        rank=rank,
        ranks=range(num_ranks),
        is_ending=is_ending,
    )


def on_every_rank(call: Callable[[int], int | str]) -> list[int | str]:
    with ThreadPoolExecutor(NUM_RANKS) as ranks:
        return list(ranks.map(call, range(NUM_RANKS)))


def offer(
    store: HashStore, offers: Sequence[int], choose: Callable[[Sequence[int]], int]
) -> Callable[[int], int | str]:
    def on_rank(rank: int) -> int | str:
        try:
            return run_blocking(join(store, rank).agree("place", offers[rank], choose, timeout_s=TIMEOUT_S))
        except CycleAborted as aborted:
            return str(aborted)

    return on_rank


@pytest.mark.parametrize(("choose", "expected"), [(max, 9), (min, 2)])
def test_all_ranks_learn_the_one_number(choose: Callable[[Sequence[int]], int], expected: int) -> None:
    assert on_every_rank(offer(HashStore(), [5, 9, 2, 7], choose)) == [expected] * NUM_RANKS


def test_equal_offers_agree_and_different_ones_end_the_cycle_with_the_ranks_named() -> None:
    assert on_every_rank(offer(HashStore(), [3, 3, 3, 3], same)) == [3] * NUM_RANKS
    assert on_every_rank(offer(HashStore(), [3, 3, 4, 3], same)) == ["rank 2 differs from rank 0"] * NUM_RANKS


def test_a_missing_rank_ends_the_place_for_all_and_for_the_one_that_comes_late() -> None:
    store = HashStore()
    with pytest.raises(CycleAborted, match=r"rank 0: not every rank reached .place. within 0\.05 s"):
        run_blocking(join(store, 0).agree("place", timeout_s=0.05))
    with pytest.raises(CycleAborted, match="rank 0: not every rank") as late:
        run_blocking(join(store, 1).agree("place", timeout_s=TIMEOUT_S))
    assert not late.value.is_cancelled


def test_a_failure_elsewhere_reaches_ranks_that_wait() -> None:
    store = HashStore()
    run_blocking(join(store, 3).announce_failure("rank 3: plan: out of luck"))
    with pytest.raises(CycleAborted, match="rank 3: plan: out of luck"):
        run_blocking(join(store, 0).agree("place"))


def test_the_first_failure_is_the_one_that_all_ranks_report() -> None:
    store = HashStore()
    for rank, reason in ((1, "first"), (2, "second")):
        ended = run_blocking(join(store, rank).announce_failure(reason))
        assert (str(ended), ended.is_cancelled) == ("first", False)


def test_a_failure_that_comes_of_a_cancelled_cycle_is_none() -> None:
    store = HashStore()
    run_blocking(join(store, 1).announce_end("rank 1: closing"))
    ended = run_blocking(join(store, 2).announce_failure("rank 2: the group was closed"))
    assert (str(ended), ended.is_cancelled) == ("rank 1: closing", True)


def test_a_rank_that_is_closing_cancels_the_cycle_everywhere() -> None:
    store = HashStore()
    for rank, is_ending in ((2, lambda: "closing"), (0, str)):
        with pytest.raises(CycleAborted, match="rank 2: closing") as ended:
            run_blocking(join(store, rank, is_ending).agree("place"))
        assert ended.value.is_cancelled


def test_an_agreed_verdict_stands_against_a_later_failure() -> None:
    """A rank that lost sight of the place after offering still does what the others do."""
    store = HashStore()
    assert on_every_rank(offer(store, [1, 2, 3, 4], max)) == [4] * NUM_RANKS
    assert run_blocking(join(store, 1).settle_as_failed("place", "rank 1: lost")) == 4


def test_a_failed_verdict_stands_against_a_late_agreement() -> None:
    store = HashStore()
    with pytest.raises(CycleAborted, match="rank 1: lost"):
        run_blocking(join(store, 1).settle_as_failed("place", "rank 1: lost"))
    assert on_every_rank(offer(store, [1, 2, 3, 4], max)) == ["rank 1: lost"] * NUM_RANKS


def test_the_ranks_together_name_every_key_for_deletion() -> None:
    store = HashStore()
    places = [join(store, rank) for rank in range(NUM_RANKS)]
    on_every_rank(lambda rank: run_blocking(places[rank].agree("place", rank)))
    written = store.num_keys()
    plane = StoreControlPlane(store)
    for place in places:
        run_blocking(plane.forget(place.keys))
    assert written > 0
    assert store.num_keys() == 0
