"""Streams, events and timers of a device that torch has a module for (torch.cuda, torch.npu, torch.xpu)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from eplb_platform.backend import StreamOperations

_POLL_S = 0.0002


class DeviceStream(Protocol):
    """What is used of a module's `Stream`."""

    def wait_event(self, event: DeviceEvent, /) -> None: ...


class DeviceEvent(Protocol):
    """What is used of a module's `Event`."""

    def record(self, stream: DeviceStream, /) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: DeviceEvent, /) -> float: ...


class DeviceModule(Protocol):
    """What is used of torch.cuda and of the modules that are made after it."""

    def current_device(self) -> int: ...

    def device(self, device: int, /) -> AbstractContextManager[object]: ...

    def current_stream(self) -> DeviceStream: ...

    def stream(self, stream: DeviceStream, /) -> AbstractContextManager[object]: ...

    def is_current_stream_capturing(self) -> bool: ...

    def Stream(self, device: int, /) -> DeviceStream: ...

    def Event(self, enable_timing: bool = False) -> DeviceEvent: ...


class CaptureError(RuntimeError):
    """The forward thread is capturing a graph: what it enqueues now would run at every replay."""


@dataclass(frozen=True)
class _Mark:
    """An event that was recorded: one that was not would count as passed."""

    event: DeviceEvent


class TorchStreams(StreamOperations):
    """A transfer stream beside whichever stream the forward thread has made its current one.

    Made on the forward thread, with the model's device as its current one; other threads start on device 0.
    """

    def __init__(self, module: DeviceModule) -> None:
        self._module = module
        self._device = module.current_device()
        self._transfer = module.Stream(self._device)

    @contextmanager
    def transfer(self) -> Iterator[None]:
        with self._module.device(self._device), self._module.stream(self._transfer):
            yield

    def record(self) -> object:
        """As `StreamOperations.record`. Raises `CaptureError` during graph capture."""
        return _Mark(_recorded(self._module, timed=False))

    def wait(self, mark: object) -> None:
        self._module.current_stream().wait_event(_event(mark))

    def passed(self, mark: object) -> bool:
        return _event(mark).query()

    def keep(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._module.current_stream())  # type: ignore[arg-type]  # the module's own

    def check_not_capturing(self) -> None:
        """As `StreamOperations.check_not_capturing`, with a `CaptureError`."""
        _check_not_capturing(self._module)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """As `StreamOperations.copy`.

        Tensors may be given back while the copy is pending. Host memory has to be pinned, else torch would
        synchronise the thread: ValueError.
        """
        for tensor in (target, source):
            if tensor.device.type != "cpu":
                self.keep(tensor)
            elif tensor.numel() and not tensor.is_pinned():
                raise ValueError(
                    f"{tensor.nbytes} bytes of host memory are not pinned: take them from allocate_on_host"
                )
        with torch.no_grad():
            target.copy_(source, non_blocking=True)


class EventTimer:
    """A `DeviceTimer` over two timed events."""

    def __init__(self, module: DeviceModule) -> None:
        self._module = module
        self._started: DeviceEvent | None = None
        self._stopped: DeviceEvent | None = None

    def start(self) -> None:
        self._started, self._stopped = _recorded(self._module, timed=True), None

    def stop(self) -> None:
        self._stopped = _recorded(self._module, timed=True)

    def elapsed_ms(self) -> float | None:
        started, stopped = self._started, self._stopped
        if started is None or stopped is None or not (started.query() and stopped.query()):
            return None
        return started.elapsed_time(stopped)


def wait_on_host(streams: StreamOperations, mark: object, deadline: float) -> bool:
    """Whether the device passed `mark` before `deadline` (of `time.monotonic`). Not for the forward thread.

    Looks again and again: a synchronising call could not be given up, and would end with the device only.
    """
    while not streams.passed(mark):
        if time.monotonic() > deadline:
            return streams.passed(mark)
        time.sleep(_POLL_S)
    return True


def _check_not_capturing(module: DeviceModule) -> None:
    if module.is_current_stream_capturing():
        raise CaptureError("the current stream is being captured into a graph: balance between two passes")


def _recorded(module: DeviceModule, *, timed: bool) -> DeviceEvent:
    _check_not_capturing(module)
    event = module.Event(enable_timing=timed)
    event.record(module.current_stream())
    return event


def _event(mark: object) -> DeviceEvent:
    if not isinstance(mark, _Mark):
        raise TypeError(f"expected a mark that record() gave, got {mark!r}")
    return mark.event
