"""A device module that notes what is asked of it, for what cannot be seen in results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FakeStream:
    def __init__(self, module: FakeModule, name: str) -> None:
        self._module = module
        self.name = name

    def wait_event(self, event: object) -> None:
        assert isinstance(event, FakeEvent)
        self._module.log.append(f"{self.name} waits for {event.number}")


class FakeEvent:
    """Like torch's: one that was never recorded has nothing pending, so its query is true."""

    def __init__(self, module: FakeModule) -> None:
        self._module = module
        self.number = -1
        self._is_pending = False

    def record(self, stream: object) -> None:
        assert isinstance(stream, FakeStream)
        self.number = len(self._module.recorded)
        self._is_pending = True
        self._module.recorded.append(self)
        self._module.log.append(f"record {self.number} on {stream.name}")

    def query(self) -> bool:
        return not self._is_pending

    def elapsed_time(self, end_event: object) -> float:
        assert isinstance(end_event, FakeEvent)
        return 2.5

    def finish(self) -> None:
        self._is_pending = False


class FakeModule:
    """On device 3, with one current stream for each level of `stream`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.recorded: list[FakeEvent] = []
        self.devices: list[int] = []
        self.is_capturing = False
        self._streams = [FakeStream(self, "current")]

    def finish(self) -> None:
        """The device has done all that was enqueued."""
        for event in self.recorded:
            event.finish()

    def current_device(self) -> int:
        return 3

    @contextmanager
    def device(self, device: int) -> Iterator[None]:
        self.devices.append(device)
        yield
        self.devices.append(0)

    def current_stream(self) -> FakeStream:
        return self._streams[-1]

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        assert isinstance(stream, FakeStream)
        self._streams.append(stream)
        yield
        self._streams.pop()

    def is_current_stream_capturing(self) -> bool:
        return self.is_capturing

    def Stream(self, device: int) -> FakeStream:
        return FakeStream(self, f"made on device {device}")

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self)
