"""A simulated accelerator: streams that really run later, in an order that a seed chooses.

    device = SimulatedDevice(seed)
    backend = MyBackend(SimulatedStreams(device))
    ...                                # fetch, swap, forward passes
    device.finish()

Tensors lie in host memory. What goes through the streams is queued and runs at some later call, one operation
at a time and each as a whole; a stream keeps its order, and between streams only marks do. A wait that is
missing, or memory that is used again too early, therefore shows up as wrong data for some seed.

What this cannot show: numbers that a device computes differently; copies that are half done; memory that the
allocator gives out again while it is in use (`record_stream`); formats that are not what torch describes
(NZ); whether anything synchronises the thread that should not; and how long anything takes. A torch operation
that is called directly runs at once, as if the host had waited for the stream it belongs to: put the model's
own work into `launch`.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from eplb_platform.backend import StreamOperations

FORWARD = "forward"
TRANSFER = "transfer"

_PATIENCE = 0.9
"""How likely the device goes on by one more operation while somebody looks at a mark."""


class SimulationError(RuntimeError):
    """What was enqueued can never run: a stream waits for a mark that will not pass."""


@dataclass(eq=False)
class SimulatedMark:
    """A point in a stream's queue."""

    device: SimulatedDevice = field(repr=False)
    stream: str
    has_passed: bool = False


Kernel: TypeAlias = Callable[[], None]
_Operation: TypeAlias = "Kernel | SimulatedMark | _Wait | _Arrival"


@dataclass(frozen=True)
class _Wait:
    mark: SimulatedMark


@dataclass(frozen=True)
class _Arrival:
    """The stream goes on once something has come from outside of the device."""

    is_here: Callable[[], bool]


class SimulatedDevice:
    """The queues of the streams and the seeded choice of what runs next.

    Any thread may enqueue and look; operations run inside these calls. With one thread, the same seed and the
    same calls give the same order.

    eagerness: how likely one more operation runs when another is enqueued, in [0, 1); the seed's choice if
        not given. At 0 the device does nothing until somebody looks at a mark.
    """

    def __init__(
        self, seed: int, streams: Sequence[str] = (FORWARD, TRANSFER), *, eagerness: float | None = None
    ) -> None:
        self.executed = 0
        """Operations that have run, marks and waits not counted."""
        self._random = random.Random(seed)
        self._queues: dict[str, deque[_Operation]] = {stream: deque() for stream in streams}
        # A fair choice seldom lets one stream fall far behind, which is when mistakes show: seeds differ in
        # how much they prefer a stream, and in how lazy the device is as long as nobody asks for a result.
        self._weights = {stream: self._random.choice((1, 1, 30)) for stream in streams}
        by_seed = self._random.choice((0.0, 0.3, 0.8))
        self._eagerness = by_seed if eagerness is None else eagerness
        self._lock = threading.RLock()

    def enqueue(self, stream: str, operation: _Operation) -> None:
        """Put an operation behind everything that the stream has to do; some of it may run now."""
        with self._lock:
            self._queues[stream].append(operation)
            while self._random.random() < self._eagerness and self._run_one():
                pass

    def look_at(self, mark: SimulatedMark) -> bool:
        """Whether `mark` has passed; whoever asks again and again lets the device go on.

        Raises `SimulationError` when it can never pass.
        """
        with self._lock:
            while not mark.has_passed and self._random.random() < _PATIENCE:
                if not self._run_one():
                    if self._awaits_others():
                        break
                    raise SimulationError(f"nothing can run, and {mark} has not passed: {self._stuck()}")
            return mark.has_passed

    def pending(self, stream: str) -> int:
        """How much is left for a stream to do."""
        with self._lock:
            return len(self._queues[stream])

    def finish(self) -> None:
        """Run all that is queued. Raises `SimulationError` when a stream waits for ever."""
        with self._lock:
            while self._run_one():
                pass
            if any(self._queues.values()):
                raise SimulationError(f"streams wait for ever: {self._stuck()}")

    def _run_one(self) -> bool:
        ready = [stream for stream, queue in self._queues.items() if queue and _can_run(queue[0])]
        if not ready:
            return False
        stream = ready[0] if len(ready) == 1 else self._choose(ready)
        operation = self._queues[stream].popleft()
        if isinstance(operation, SimulatedMark):
            operation.has_passed = True
        elif not isinstance(operation, _Wait | _Arrival):
            self.executed += 1
            operation()
        return True

    def _awaits_others(self) -> bool:
        return any(queue and isinstance(queue[0], _Arrival) for queue in self._queues.values())

    def _choose(self, ready: Sequence[str]) -> str:
        return self._random.choices(ready, [self._weights[stream] for stream in ready])[0]

    def _stuck(self) -> str:
        return ", ".join(f"{stream} at {queue[0]}" for stream, queue in self._queues.items() if queue)


class SimulatedStreams(StreamOperations):
    """The streams of a simulated device, for a backend. Each thread begins on the forward stream."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.is_capturing = False
        """Set by a test."""
        self._thread = threading.local()

    @contextmanager
    def transfer(self) -> Iterator[None]:
        before = self._current
        self._thread.stream = TRANSFER
        try:
            yield
        finally:
            self._thread.stream = before

    def record(self) -> SimulatedMark:
        self.check_not_capturing()
        mark = SimulatedMark(self.device, self._current)
        self.device.enqueue(self._current, mark)
        return mark

    def wait(self, mark: object) -> None:
        self.device.enqueue(self._current, _Wait(self._own(mark)))

    def passed(self, mark: object) -> bool:
        return self.device.look_at(self._own(mark))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target, source = target.detach(), source.detach()
        if target.shape != source.shape:
            raise ValueError(f"cannot copy {list(source.shape)} into {list(target.shape)}")
        self.device.enqueue(self._current, lambda: _copy(target, source))

    def launch(self, kernel: Kernel) -> None:
        """Run a function on the current stream: a kernel of the model, say."""
        self.device.enqueue(self._current, kernel)

    def await_arrival(self, is_here: Callable[[], bool]) -> None:
        """Make the current stream wait for something from outside of the device, a message say."""
        self.device.enqueue(self._current, _Arrival(is_here))

    def check_not_capturing(self) -> None:
        if self.is_capturing:
            raise RuntimeError("the simulated stream is being captured into a graph")

    @property
    def _current(self) -> str:
        return getattr(self._thread, "stream", FORWARD)

    def _own(self, mark: object) -> SimulatedMark:
        if not isinstance(mark, SimulatedMark) or mark.device is not self.device:
            raise TypeError(f"expected a mark of this device, got {mark!r}")
        return mark


class SimulatedTimer:
    """A `DeviceTimer` over marks; what it measures is when the simulation ran, and means nothing."""

    def __init__(self, streams: SimulatedStreams) -> None:
        self._streams = streams
        self._started: SimulatedMark | None = None
        self._stopped: SimulatedMark | None = None
        self._times_ns: dict[str, int] = {}

    def start(self) -> None:
        self._stopped, self._times_ns = None, {}
        self._started = self._timed("start")

    def stop(self) -> None:
        self._stopped = self._timed("stop")

    def elapsed_ms(self) -> float | None:
        for mark in (self._started, self._stopped):
            if mark is None or not self._streams.passed(mark):
                return None
        return (self._times_ns["stop"] - self._times_ns["start"]) / 1e6

    def _timed(self, point: str) -> SimulatedMark:
        times_ns = self._times_ns

        def note() -> None:
            times_ns[point] = time.perf_counter_ns()

        self._streams.launch(note)
        return self._streams.record()


def _can_run(operation: _Operation) -> bool:
    if isinstance(operation, _Arrival):
        return operation.is_here()
    return not isinstance(operation, _Wait) or operation.mark.has_passed


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
