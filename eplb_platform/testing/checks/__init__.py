"""The clauses of the backend contract, one function for each, and what they are written with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import Store

from eplb_platform.backend import Backend, Message


class ContractViolation(AssertionError):
    """A backend does not do what its contract says."""


@dataclass(frozen=True)
class Site:
    """Where a check runs: one rank, with a new backend."""

    backend: Backend
    rank: int
    num_ranks: int
    store: Store
    device: torch.device
    timeout_s: float

    @property
    def peers(self) -> list[int]:
        return [peer for peer in range(self.num_ranks) if peer != self.rank]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Exchange as the contract asks callers to; the current stream may then read what was received."""
        streams = self.backend.streams
        before = streams.record()
        with streams.transfer():
            streams.wait(before)
            self.backend.exchange(sends, receives)
            received = streams.record()
        streams.wait(received)
        self.settle()

    def settle(self) -> None:
        """Wait until the device has done what the current stream holds, so that the host may look at it."""
        mark = self.backend.streams.record()
        deadline = time.monotonic() + self.timeout_s
        while not self.backend.streams.passed(mark):
            require(time.monotonic() < deadline, f"a mark has not passed after {self.timeout_s} s")
            time.sleep(0.0005)

    def meet(self, place: str) -> None:
        """Wait on the store until every rank is here."""
        self.store.set(f"{place}/{self.rank}", "here")
        self.store.wait([f"{place}/{rank}" for rank in range(self.num_ranks)])


@dataclass(frozen=True)
class Check:
    """One clause. `connected` ones get a backend that is connected and warmed up, with this time-out."""

    name: str
    function: Callable[[Site], None]
    connected: bool
    timeout_s: float
    min_ranks: int
    """2 for a clause about messages between ranks."""


CHECKS: dict[str, Check] = {}


def check(
    *, connected: bool, timeout_s: float = 30.0, min_ranks: int = 1
) -> Callable[[Callable[[Site], None]], Callable[[Site], None]]:
    """Enter a function into `CHECKS` under its own name."""

    def enter(function: Callable[[Site], None]) -> Callable[[Site], None]:
        CHECKS[function.__name__] = Check(function.__name__, function, connected, timeout_s, min_ranks)
        return function

    return enter


def require(condition: bool, otherwise: str) -> None:
    """Raise `ContractViolation` that says `otherwise` unless `condition`."""
    if not condition:
        raise ContractViolation(otherwise)


def require_equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The same type, shape and bytes."""
    same_kind = actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if not same_kind or not torch.equal(_bytes(actual), _bytes(expected)):
        raise ContractViolation(f"{what}: got {actual}, expected {expected}")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
