"""Streams and timer of a device whose operations are complete when they return."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch

from eplb_platform.backend import StreamOperations


class SerialStreams(StreamOperations):
    """Every operation is complete when it returns, so every mark has passed."""

    def transfer(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self) -> object:
        return None

    def wait(self, mark: object) -> None:
        pass

    def passed(self, mark: object) -> bool:
        return True

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.no_grad():
            target.copy_(source)


class HostTimer:
    """A `DeviceTimer` over the host's clock."""

    def __init__(self) -> None:
        self._started_ns: int | None = None
        self._stopped_ns: int | None = None

    def start(self) -> None:
        self._started_ns, self._stopped_ns = time.perf_counter_ns(), None

    def stop(self) -> None:
        self._stopped_ns = time.perf_counter_ns()

    def elapsed_ms(self) -> float | None:
        if self._started_ns is None or self._stopped_ns is None:
            return None
        return (self._stopped_ns - self._started_ns) / 1e6
