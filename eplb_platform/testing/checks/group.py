"""Clauses about the process group that balancing uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Timer

import numpy as np
import torch

from eplb_platform.backend import GroupError, Message
from eplb_platform.testing.checks import ContractViolation, Site, check, require, require_equal

_BIG = 16 * 2**20
"""Bytes of a message that takes long enough to be interrupted."""


@check(connected=True)
def sums_on_host(site: Site) -> None:
    """`sum_on_host` adds up arrays of any shape and leaves its argument as it was."""
    for shape in ((), (0,), (1,), (3, 5), (2, 40_000)):
        base = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape) + 10**15
        values = base * (site.rank + 1)
        kept = values.copy()
        total = site.backend.sum_on_host(values)
        expected = base * (site.num_ranks * (site.num_ranks + 1) // 2)
        require(total.dtype == np.int64 and total.shape == shape, f"sum of shape {shape} has {total.shape}")
        require(bool((total == expected).all()), f"sum of shape {shape} is {total}, expected {expected}")
        require(bool((values == kept).all()), "sum_on_host changed its argument")


@check(connected=True)
def broadcasts_on_host(site: Site) -> None:
    """`broadcast_on_host` gives every rank the source's array, and changes nobody's argument."""
    for source in range(site.num_ranks):
        values = np.arange(12, dtype=np.int64).reshape(3, 4) + 100 * site.rank
        kept = values.copy()
        result = site.backend.broadcast_on_host(values, source)
        require(
            bool((result == np.arange(12).reshape(3, 4) + 100 * source).all()), f"got {result} from {source}"
        )
        require(bool((values == kept).all()), "broadcast_on_host changed its argument")


@check(connected=True, min_ranks=2)
def exchanges_between_all_pairs_in_order(site: Site) -> None:
    """Each pair's messages arrive in the order in which both list them, whatever their number and size."""
    for round_ in range(3):
        sends, receives, expected = [], [], []
        for peer in site.peers:
            for place in range(4):
                sends.append(Message(peer, _parcel(site, site.rank, peer, place, round_)))
                expected.append(_parcel(site, peer, site.rank, place, round_))
                receives.append(Message(peer, torch.zeros_like(expected[-1])))
        site.exchange(sends, receives)
        for message, parcel in zip(receives, expected, strict=True):
            require_equal(message.tensor, parcel, f"round {round_}, from rank {message.peer}")


@check(connected=True, min_ranks=2)
def exchanges_every_type_of_weight(site: Site) -> None:
    """The bytes of any type arrive as they are."""
    types = (
        torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool,
    )  # fmt: skip
    after, before = (site.rank + 1) % site.num_ranks, (site.rank - 1) % site.num_ranks
    sends, receives, expected = [], [], []
    for dtype in types:
        sends.append(Message(after, _all_bits(site, site.rank).view(dtype)))
        expected.append(_all_bits(site, before).view(dtype))
        receives.append(Message(before, torch.zeros_like(expected[-1])))
    site.exchange(sends, receives)
    for message, tensor in zip(receives, expected, strict=True):
        require_equal(message.tensor, tensor, f"a tensor of {tensor.dtype}")


@check(connected=True, min_ranks=2)
def exchanges_scattered_tensors(site: Site) -> None:
    """Tensors whose elements do not lie together are sent and filled, and nothing beside them is."""
    after, before = (site.rank + 1) % site.num_ranks, (site.rank - 1) % site.num_ranks
    target = torch.zeros(6, 8, device=site.device)
    site.exchange(
        [Message(after, _pattern(site, site.rank).t())], [Message(before, target[::2, ::2].t()[:, :3])]
    )
    expected = torch.zeros(6, 8, device=site.device)
    expected[::2, ::2].t()[:, :3].copy_(_pattern(site, before).t())
    require_equal(target, expected, "a transposed, strided tensor")


@check(connected=True, min_ranks=2)
def exchanges_little_or_nothing(site: Site) -> None:
    """A rank may have nothing to send, nothing to receive, or neither, and a tensor may be empty."""
    site.exchange([], [])
    value = torch.full((5,), 7.0, device=site.device)
    received, nothing = torch.zeros(5, device=site.device), torch.zeros(0, device=site.device)
    if site.rank == 0:
        site.exchange([Message(1, nothing), Message(1, value)], [])
    elif site.rank == 1:
        site.exchange([], [Message(0, nothing), Message(0, received)])
        require_equal(received, value, "the only message")
    require(
        int(site.backend.sum_on_host(np.ones(1, np.int64))[0]) == site.num_ranks, "the group is out of step"
    )


@check(connected=True, min_ranks=2)
def sent_tensors_may_change_after_exchange(site: Site) -> None:
    """What a sender writes after `exchange` has returned does not reach the receiver."""
    after, before = (site.rank + 1) % site.num_ranks, (site.rank - 1) % site.num_ranks
    sent = torch.empty(_BIG // 4, dtype=torch.int32, device=site.device)
    received = torch.zeros_like(sent)
    for round_ in range(3):
        sent.fill_(10 * site.rank + round_)
        site.exchange([Message(after, sent)], [Message(before, received)])
        sent.fill_(-1)
        require_equal(received, torch.full_like(received, 10 * before + round_), f"round {round_}")


@check(connected=True, timeout_s=60.0, min_ranks=2)
def abort_ends_a_pending_exchange_everywhere(site: Site) -> None:
    """`abort` on one rank ends exchanges with it at once, on the rank itself too, with `GroupError`."""
    operation = _lengthy_operation(site, site.peers)
    if site.rank == 0:
        Timer(0.05, site.backend.abort).start()
    _require_prompt_group_error(site, lambda: _repeat(operation))


@check(connected=True, timeout_s=60.0, min_ranks=2)
def abort_ends_a_pending_sum_everywhere(site: Site) -> None:
    """`abort` on a rank that does not take part ends the others' sum at once."""
    if site.rank == 0:
        Timer(0.2, site.backend.abort).start()
    else:
        _require_prompt_group_error(site, lambda: site.backend.sum_on_host(np.ones(40_000, np.int64)))
    site.meet("after the sum")


@check(connected=True)
def nothing_is_received_after_abort(site: Site) -> None:
    """Tensors that were given to `exchange` keep their content once `abort` has returned."""
    sends, receives = _big_messages(site)
    kept: list[torch.Tensor] = []

    def abort_and_look() -> None:
        site.backend.abort()
        kept.extend(message.tensor.clone() for message in receives)

    aborter = Timer(0.01 * (1 + site.rank), abort_and_look)
    aborter.start()
    _require_group_error(lambda: _repeat(lambda: site.exchange(sends, receives)), "an aborted exchange")
    aborter.join()
    site.meet("all have aborted")
    time.sleep(0.2)
    for message, before in zip(receives, kept, strict=True):
        require(
            torch.equal(message.tensor, before), f"a tensor from rank {message.peer} was written after abort"
        )


@check(connected=True, timeout_s=4.0, min_ranks=2)
def a_missing_rank_ends_the_others_by_time_out(site: Site) -> None:
    """When one rank does not take part the others get `GroupError`, in an exchange and in `rebuild`."""
    if site.rank != 0:
        sends, receives = _big_messages(site, [0])
        _require_group_error(
            lambda: site.exchange(sends, receives), "an exchange with a rank that is missing"
        )
        _require_group_error(lambda: site.backend.rebuild(1), "a rebuild without rank 0")
    site.meet("all have waited")
    site.backend.rebuild(2)
    _require_right_sum(site)


@check(connected=True)
def an_aborted_group_works_again_after_rebuild(site: Site) -> None:
    """An aborted group refuses work until it is rebuilt; ranks may come to that at different times."""
    for epoch in range(1, 5):
        site.backend.abort()
        site.backend.abort()
        _require_group_error(
            lambda: site.backend.sum_on_host(np.ones(1, np.int64)), "a sum in an aborted group"
        )
        _require_group_error(lambda: site.exchange(*_big_messages(site)), "an exchange in an aborted group")
        time.sleep(0.05 * ((site.rank + epoch) % site.num_ranks))
        site.backend.rebuild(epoch)
        _require_right_sum(site)


@check(connected=True, timeout_s=60.0, min_ranks=2)
def the_death_of_a_rank_ends_the_others(site: Site) -> None:
    """When a rank gives back its group, as by ending, exchanges with it end with `GroupError` at once."""
    if site.rank == 0:
        time.sleep(0.2)
        site.backend.close()
    else:
        _require_prompt_group_error(site, _lengthy_operation(site, [0]))
    site.meet("all have failed")


@check(connected=True, timeout_s=60.0, min_ranks=2)
def what_the_forward_thread_enqueues_arrives(site: Site) -> None:
    """Where `enqueues_on_forward`: a prepared exchange touches nothing until `enqueue`, which waits for no
    other rank; after `abort` and `rebuild`, `open_exchange` makes a group that carries the next one.
    """
    if not site.backend.enqueues_on_forward:
        return
    after, before = (site.rank + 1) % site.num_ranks, (site.rank - 1) % site.num_ranks
    for epoch in (0, 1):
        sent = torch.zeros(3, 1000, device=site.device).t()
        received = torch.zeros_like(sent)
        streams = site.backend.streams
        with streams.transfer():
            prepared = site.backend.prepare_exchange([Message(after, sent)], [Message(before, received)])
        sent.fill_(10.0 * site.rank + epoch)
        require_equal(received, torch.zeros_like(received), "what is only prepared")
        if site.rank == 0:
            site.store.wait([f"enqueued/{epoch}/{rank}" for rank in range(1, site.num_ranks)])
        is_filled = streams.record()
        with streams.transfer():
            streams.wait(is_filled)
            prepared.enqueue()
            arrived = streams.record()
        site.store.set(f"enqueued/{epoch}/{site.rank}", "")
        streams.wait(arrived)
        site.settle()
        require_equal(received, torch.full_like(received, 10.0 * before + epoch), f"epoch {epoch}")
        site.meet(f"arrived/{epoch}")
        site.backend.abort()
        site.backend.rebuild(epoch + 1)
        site.backend.open_exchange(epoch + 1)


@check(connected=True)
def close_may_be_repeated(site: Site) -> None:
    """`close` and `abort` may follow `close`, in any order."""
    site.meet("all are connected")
    site.backend.close()
    site.backend.abort()
    site.backend.close()


def _parcel(site: Site, source: int, target: int, place: int, round_: int) -> torch.Tensor:
    """A tensor that differs for every message; the second and third of a pair are of one size."""
    size = (1, 1000, 1000, 70_000)[place]
    start = float(1000 * source + 100 * target + 10 * place + round_)
    return torch.arange(size, device=site.device, dtype=torch.float32) + start


def _pattern(site: Site, rank: int) -> torch.Tensor:
    return torch.arange(12, device=site.device, dtype=torch.float32).reshape(3, 4) + rank


def _all_bits(site: Site, rank: int) -> torch.Tensor:
    """Bytes of which a conversion of any type would lose some: large, small, denormal, not a number."""
    return (torch.arange(256, device=site.device) + rank).to(torch.uint8)


def _big_messages(site: Site, peers: list[int] | None = None) -> tuple[list[Message], list[Message]]:
    chosen = site.peers if peers is None else peers
    sends = [Message(peer, torch.ones(_BIG, dtype=torch.uint8, device=site.device)) for peer in chosen]
    receives = [Message(peer, torch.zeros(_BIG, dtype=torch.uint8, device=site.device)) for peer in chosen]
    return sends, receives


def _lengthy_operation(site: Site, peers: list[int]) -> Callable[[], object]:
    """An exchange with `peers`; a sum where exchanges are the device's own, which others do not end."""
    if site.backend.enqueues_on_forward:
        return lambda: site.backend.sum_on_host(np.ones(_BIG // 8, np.int64))
    sends, receives = _big_messages(site, peers)
    return lambda: site.exchange(sends, receives)


def _repeat(operation: Callable[[], object]) -> None:
    """Until it raises; the checks raise in it at the latest after the backend's time-out."""
    while True:
        operation()


def _require_group_error(operation: Callable[[], object], what: str) -> None:
    try:
        operation()
    except GroupError:
        return
    raise ContractViolation(f"{what} raised no GroupError")


def _require_prompt_group_error(site: Site, operation: Callable[[], object]) -> None:
    started = time.monotonic()
    _require_group_error(operation, "what was pending")
    waited = time.monotonic() - started
    require(waited < site.timeout_s / 2, f"ended after {waited:.1f} s, by the time-out of {site.timeout_s} s")


def _require_right_sum(site: Site) -> None:
    total = int(site.backend.sum_on_host(np.full(1, site.rank, np.int64))[0])
    expected = site.num_ranks * (site.num_ranks - 1) // 2
    require(total == expected, f"after rebuild the sum is {total}, expected {expected}")
