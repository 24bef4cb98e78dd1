"""The control plane: one store, and the way to it, on which messages are late, overtake each other and are
lost.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

from eplb_platform.runtime.ports import ControlPlane
from eplb_platform.testing.cluster.scheduler import Scheduler, Task

Result = TypeVar("Result")
Request: TypeAlias = Coroutine[Any, Any, Result]

LATENCY_S = 4e-4
"""Mean time of a request on its way to the store."""


class StoreUnreachable(ConnectionError):
    """What a store's client raises when no answer came."""


class SimulatedStore:
    """Keys and values; tasks that looked for a key are woken when it is written."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.values: dict[str, str] = {}
        self.most_keys = 0
        self._scheduler = scheduler
        self._waiting: dict[str, dict[Task, None]] = {}

    def settle(self, key: str, value: str) -> str:
        if key not in self.values:
            self.values[key] = value
            self.most_keys = max(self.most_keys, len(self.values))
            for task in self._waiting.pop(key, ()):
                self._scheduler.wake(task)
        return self.values[key]

    def read_all(self, keys: Sequence[str]) -> list[str]:
        return [self.values[key] for key in keys]

    def count(self, key: str) -> int:
        number = int(self.values.get(key, "0")) + 1
        self.values[key] = str(number)
        return number

    def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.values.pop(key, None)
            self._waiting.pop(key, None)

    def wake_when_written(self, keys: Sequence[str], task: Task) -> None:
        """Wake `task`, if it is parked, when one of `keys` is written."""
        for key in keys:
            self._waiting.setdefault(key, {})[task] = None


@dataclass
class Weather:
    """How the way to the store is for one rank."""

    slowness: float = 1.0
    """Factor on the latency."""
    loss: float = 0.0
    """Part of the requests that get no answer; half of them have been executed."""
    is_gone: bool = False
    lost_requests: int = 0
    has_lost: bool = field(default=False, repr=False)
    """Whether this rank ever got no answer."""


class SimulatedPlane(ControlPlane):
    """One rank's client of the store.

    timeout_s: of the client, for a request that gets no answer
    on_request: called with the name of the method, before anything else
    """

    def __init__(
        self,
        store: SimulatedStore,
        scheduler: Scheduler,
        weather: Weather,
        draw: random.Random,
        *,
        timeout_s: float,
        on_request: Callable[[], None],
    ) -> None:
        self.requests: Counter[str] = Counter()
        self._store = store
        self._scheduler = scheduler
        self._weather = weather
        self._random = draw
        self._timeout_s = timeout_s
        self._on_request = on_request

    def settle(self, key: str, value: str) -> Request[str]:
        return self._request(partial(self._store.settle, key, value))

    async def read(self, key: str) -> str | None:
        value = await self._request(partial(self._store.values.get, key), at_once=0.6)
        if value is None and self._scheduler.current is not None:
            self._scheduler.current.looked_for.append(key)
        return value

    def read_all(self, keys: Sequence[str]) -> Request[list[str]]:
        return self._request(partial(self._store.read_all, keys))

    def count(self, key: str) -> Request[int]:
        return self._request(partial(self._store.count, key), at_once=0.5)

    async def forget(self, keys: Sequence[str]) -> None:
        if keys:
            await self._request(partial(self._store.forget, keys))

    async def _request(self, execute: Callable[[], Result], at_once: float = 0.2) -> Result:
        """The latency is drawn anew for each request, so that those of two ranks overtake each other.

        at_once: how often nobody else comes between this request and the one before it
        """
        self._on_request()
        weather, draw = self._weather, self._random.random
        if draw() >= at_once:
            await self._scheduler.sleep(LATENCY_S * weather.slowness * (0.25 + 1.5 * draw() ** 2))
        if weather.is_gone or (weather.loss and draw() < weather.loss):
            if not weather.is_gone and draw() < 0.5:
                execute()
            weather.lost_requests += 1
            weather.has_lost = True
            await self._scheduler.sleep(self._timeout_s * (0.1 + draw()))
            raise StoreUnreachable("no answer from the store")
        result = execute()
        if draw() < 0.1:  # so that news is sometimes old when it arrives
            await self._scheduler.sleep(LATENCY_S * weather.slowness * draw())
        return result
