"""A limit on the time of any planner, so that one that never answers holds up nothing else."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime.gate import ForwardGate
from eplb_platform.runtime.planning import PlannerTimeout
from eplb_platform.runtime.ports import Clock, ExpertLoad, Planner


@dataclass
class _Question:
    is_over: bool = False
    answer: ExpertMap | None = None
    error: Exception | None = None


class BoundedPlanner:
    """Asks `planner` beside the background thread, and leaves it behind when it takes more than `timeout_s`.

    What it answers then is not used. It is asked nothing else before it has answered: a planner need not bear
    two questions at once.

    run: runs a coroutine beside the calling thread
    """

    def __init__(
        self,
        planner: Planner,
        clock: Clock,
        gate: ForwardGate,
        *,
        timeout_s: float,
        run: Callable[[Coroutine[None, None, None]], object],
    ) -> None:
        self._planner = planner
        self._clock = clock
        self._gate = gate
        self._timeout_s = timeout_s
        self._run = run
        self._last = _Question(is_over=True)

    async def plan(self, load: ExpertLoad, current: ExpertMap) -> ExpertMap:
        """As of `Planner`. Raises `PlannerTimeout`, and what the planner raises."""
        started = self._clock.now()
        await self._answer(self._last, started, "has not answered an earlier question yet")
        question = self._last = _Question()
        self._run(self._ask(question, load, current))
        await self._answer(question, started, f"gave no plan within {self._timeout_s:g} s")
        if question.error is not None:
            raise question.error
        return question.answer  # type: ignore[return-value]  # the cycle looks what it is

    async def _answer(self, question: _Question, started: float, otherwise: str) -> None:
        left = started + self._timeout_s - self._clock.now()
        if not (question.is_over or await self._clock.until(lambda: question.is_over, left)):
            raise PlannerTimeout(f"{type(self._planner).__name__} {otherwise}")

    async def _ask(self, question: _Question, load: ExpertLoad, current: ExpertMap) -> None:
        try:
            question.answer = await self._planner.plan(load, current)
        except Exception as error:
            question.error = error
        finally:
            question.is_over = True
            with self._gate.changed:
                self._gate.changed.notify_all()
