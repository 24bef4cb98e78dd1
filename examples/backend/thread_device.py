"""A device made of two threads: its streams run beside the threads that feed them, as an accelerator's do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import ClassVar

import torch

from eplb_backends.accelerator import AcceleratorBackend
from eplb_backends.cpu.streams import HostTimer
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations


class WorkerStream:
    """Runs what is enqueued, in order, in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def enqueue(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def close(self) -> None:
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class ThreadStreams(StreamOperations):
    """A mark is a `threading.Event`, set by the stream that it was recorded on."""

    def __init__(self) -> None:
        self._forward = WorkerStream("forward stream")
        self._transfer = WorkerStream("transfer stream")
        self._thread = threading.local()

    @contextmanager
    def transfer(self) -> Iterator[None]:
        self._thread.stream = self._transfer
        try:
            yield
        finally:
            self._thread.stream = self._forward

    def record(self) -> threading.Event:
        mark = threading.Event()
        self._current.enqueue(mark.set)
        return mark

    def wait(self, mark: object) -> None:
        assert isinstance(mark, threading.Event)
        self._current.enqueue(mark.wait)

    def passed(self, mark: object) -> bool:
        assert isinstance(mark, threading.Event)
        return mark.is_set()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target, source = target.detach(), source.detach()
        self._current.enqueue(lambda: target.copy_(source))

    def close(self) -> None:
        for stream in (self._forward, self._transfer):
            stream.close()

    @property
    def _current(self) -> WorkerStream:
        stream: WorkerStream = getattr(self._thread, "stream", self._forward)
        return stream


class ThreadBackend(AcceleratorBackend):
    name: ClassVar[str] = "thread"
    device_type: ClassVar[str] = "cpu"
    collective = "gloo"
    contract_version: ClassVar[int] = 1

    @classmethod
    def availability(cls) -> Availability:
        return Availability(True, "ready", {"torch": str(torch.__version__)})

    def default_streams(self) -> StreamOperations:
        return ThreadStreams()

    def timer(self) -> DeviceTimer:
        return HostTimer()

    def close(self) -> None:
        super().close()
        if isinstance(self.streams, ThreadStreams):
            self.streams.close()
