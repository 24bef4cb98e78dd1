"""What experts cost to compute: measured while serving, for planning by time instead of tokens.

The methods have the names of SGLang's proposal for compute-cost-aware balancing. Experts are logical ones, so
that replicas are merged and a rearrangement loses nothing. No method waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Floats: TypeAlias = NDArray[np.float64]

# Measurements that wait for the device, and passes of grouped kernels that wait to be folded in.
_MOST_PENDING = 4096
_MOST_GROUPED = 256
# Pulls a fitted cost towards the layer's common one: as much as this part of its tokens' own evidence.
_RIDGE = 1e-6


class TimedEvent(Protocol):
    """An event of a device's stream that knows its time, as torch.cuda.Event(enable_timing=True)."""

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: TimedEvent) -> float: ...


class ElapsedTimer(Protocol):
    """What Backend.timer() returns, stopped."""

    def elapsed_ms(self) -> float | None: ...


class ExpertComputeProfiler:
    """Sums up what each logical expert's computation took, in memory that does not grow.

    num_layers, num_logical_experts: of the model
    enable_profiling: False makes every method do nothing
    warmup_steps: forward passes before the first measurement
    profiling_interval: forward passes from one measurement to the next

    Not for several threads at once. Raises ValueError for counts out of range.
    """

    def __init__(
        self,
        num_layers: int,
        num_logical_experts: int,
        *,
        enable_profiling: bool = True,
        warmup_steps: int = 10,
        profiling_interval: int = 1,
    ) -> None:
        for name, value, least in (
            ("num_layers", num_layers, 1),
            ("num_logical_experts", num_logical_experts, 1),
            ("warmup_steps", warmup_steps, 0),
            ("profiling_interval", profiling_interval, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        self.num_layers = num_layers
        self.num_logical_experts = num_logical_experts
        self.enable_profiling = enable_profiling
        self.warmup_steps = warmup_steps
        self.profiling_interval = profiling_interval
        self._clear()

    @property
    def profiling_enabled(self) -> bool:
        """Whether measurements are taken now."""
        return self._started

    @property
    def overhead_ms(self) -> float:
        """What the profiler itself took so far, on the calling thread."""
        return self._overhead_ns / 1e6

    @property
    def num_dropped(self) -> int:
        """Measurements given up because the device had not passed them before others filled their place."""
        return self._num_dropped

    def on_forward_pass_start(self) -> None:
        """Count a forward pass; after the warm-up, measuring begins by itself."""
        self._forward_pass_count += 1
        if self._forward_pass_count == self.warmup_steps + 1:
            self.start_profiling()

    def start_profiling(self) -> None:
        """Measure from now on."""
        self._started = self.enable_profiling

    def stop_profiling(self) -> None:
        """Measure no more; what was measured stays."""
        self._started = False

    def should_profile_this_pass(self) -> bool:
        """Whether the present forward pass is one to measure."""
        return self._started and self._forward_pass_count % self.profiling_interval == 0

    def profile_expert_execution(
        self,
        layer_idx: int,
        expert_idx: int,
        num_tokens: int,
        execution_time_ms: float | None = None,
        start_event: TimedEvent | None = None,
        end_event: TimedEvent | None = None,
        timer: ElapsedTimer | None = None,
    ) -> None:
        """Add one computation of one expert, unless this pass is not to be measured.

        layer_idx, expert_idx: the layer and the logical expert; num_tokens: that it computed
        execution_time_ms, or both events, or a stopped timer: how long it took. Events and timers are asked
            later, when the device has passed them.

        Raises ValueError for an unknown expert, a count or a time that is not possible, and without a time.
        """
        if not self.should_profile_this_pass():
            return
        started = time.perf_counter_ns()
        if not (0 <= layer_idx < self.num_layers and 0 <= expert_idx < self.num_logical_experts):
            raise ValueError(
                f"layer {layer_idx}, expert {expert_idx}: expected below {self.num_layers} and "
                f"{self.num_logical_experts}"
            )
        if num_tokens < 0:
            raise ValueError(f"layer {layer_idx}, expert {expert_idx}: {num_tokens} tokens")

        def add(milliseconds: float) -> None:
            self._totals[:, layer_idx, expert_idx] += (milliseconds, num_tokens, 1)

        self._measured(execution_time_ms, start_event, end_event, timer, add)
        self._overhead_ns += time.perf_counter_ns() - started

    def profile_grouped_execution(
        self,
        layer_idx: int,
        num_tokens: ArrayLike,
        execution_time_ms: float | None = None,
        start_event: TimedEvent | None = None,
        end_event: TimedEvent | None = None,
        timer: ElapsedTimer | None = None,
    ) -> None:
        """Add one run of a kernel that computes many experts, unless this pass is not to be measured.

        num_tokens: [logical], tokens that the kernel computed for each expert

        One time for many experts does not say what each took. Over many runs with different tokens it does:
        the time is fitted as a constant + a cost for each active expert + the tokens of each times its cost;
        see `grouped_residual`. Errors as of `profile_expert_execution`.
        """
        if not self.should_profile_this_pass():
            return
        started = time.perf_counter_ns()
        tokens = np.array(num_tokens, dtype=np.float64)
        if not 0 <= layer_idx < self.num_layers or tokens.shape != (self.num_logical_experts,):
            raise ValueError(
                f"layer {layer_idx}, tokens {list(tokens.shape)}: expected below {self.num_layers} and "
                f"[{self.num_logical_experts}]"
            )

        def add(milliseconds: float) -> None:
            runs = self._grouped.setdefault(layer_idx, _GroupedRuns(self.num_logical_experts))
            runs.add(tokens, milliseconds)

        self._measured(execution_time_ms, start_event, end_event, timer, add)
        self._overhead_ns += time.perf_counter_ns() - started

    def grouped_residual(self) -> _Floats:
        """[layers], how much of the grouped kernels' time the fit does not explain.

        Root mean square of what is left / of the times: 0 is a perfect fit; NaN without such measurements.
        """
        self._settle()
        residual = np.full(self.num_layers, np.nan)
        for layer, runs in self._grouped.items():
            residual[layer] = runs.fit()[1]
        return residual

    def get_totals(self) -> _Floats:
        """[3, layers, logical]: milliseconds, tokens and invocations of each expert.

        The sum of the totals of all ranks is the profile of all: see `add_totals`. Grouped runs stand in it
        with the time of their fit, which leaves out the constant and the cost of being active.
        """
        self._settle()
        totals = self._totals.copy()
        for layer, runs in self._grouped.items():
            cost, _ = runs.fit()
            known = np.isfinite(cost)
            totals[0, layer, known] += (cost * runs.tokens)[known]
            totals[1, layer, known] += runs.tokens[known]
            totals[2, layer, known] += runs.invocations[known]
        return totals

    def add_totals(self, totals: ArrayLike) -> None:
        """Add what other ranks measured, [3, layers, logical] as of `get_totals`. Raises ValueError."""
        added = np.asarray(totals, dtype=np.float64)
        if added.shape != self._totals.shape or not np.isfinite(added).all() or (added < 0).any():
            raise ValueError(f"totals are {list(added.shape)}, expected finite {list(self._totals.shape)}")
        self._totals += added

    def get_expert_compute_weights(
        self, layer_idx: int | None = None, use_time_per_token: bool = True
    ) -> _Floats:
        """[layers, logical] or, of one layer, [logical]: milliseconds of a token, or of an invocation.

        NaN for an expert without a measurement: what is not known is not free.
        """
        totals = self.get_totals()
        divisor = totals[1] if use_time_per_token else totals[2]
        weights = np.full(divisor.shape, np.nan)
        np.divide(totals[0], divisor, out=weights, where=divisor > 0)
        return weights if layer_idx is None else np.asarray(weights[layer_idx])

    def get_adjusted_expert_load(self, token_count: ArrayLike) -> tuple[_Floats, NDArray[np.generic]]:
        """The milliseconds that tokens would take, [layers, logical], and the tokens themselves.

        token_count: [layers, logical]. An expert without a measurement costs what the layer's measured tokens
        cost on average. In a layer without any, the load is its tokens. Raises ValueError for another shape.
        """
        given = np.asarray(token_count)
        tokens = given.astype(np.float64)
        if tokens.shape != (self.num_layers, self.num_logical_experts):
            expected = [self.num_layers, self.num_logical_experts]
            raise ValueError(f"token_count is {list(tokens.shape)}, expected {expected}")
        weights = self.get_expert_compute_weights()
        spent, counted = self.get_totals()[:2].sum(axis=2, keepdims=True)
        average = np.divide(spent, counted, out=np.ones_like(spent), where=counted > 0)
        return tokens * np.where(np.isfinite(weights), weights, average), given

    def get_statistics_summary(self) -> dict[str, object]:
        """The measured experts, in the layout of SGLang's documentation."""
        totals = self.get_totals()
        layers: dict[str, object] = {}
        for layer in range(self.num_layers):
            experts = {
                f"expert_{expert}": {
                    "avg_time_per_token_ms": float(spent / tokens) if tokens else 0.0,
                    "avg_time_per_invocation_ms": float(spent / times),
                    "total_tokens": int(tokens),
                    "num_invocations": int(times),
                }
                for expert, (spent, tokens, times) in enumerate(totals[:, layer].T)
                if times > 0
            }
            if experts:
                layers[f"layer_{layer}"] = experts
        return {
            "forward_pass_count": self._forward_pass_count,
            "profiling_enabled": self.profiling_enabled,
            "layers": layers,
        }

    def reset_statistics(self) -> None:
        """Forget everything and warm up again."""
        self._clear()

    def _clear(self) -> None:
        self._totals = np.zeros((3, self.num_layers, self.num_logical_experts))
        self._grouped: dict[int, _GroupedRuns] = {}
        self._pending: deque[tuple[Callable[[], float | None], Callable[[float], None]]] = deque()
        self._num_dropped = 0
        self._forward_pass_count = 0
        self._overhead_ns = 0
        self._started = self.enable_profiling and self.warmup_steps == 0

    def _measured(
        self,
        milliseconds: float | None,
        start: TimedEvent | None,
        end: TimedEvent | None,
        timer: ElapsedTimer | None,
        add: Callable[[float], None],
    ) -> None:
        """Call `add` with the time, now or when the device knows it."""
        if milliseconds is not None:
            if not 0 <= milliseconds < float("inf"):
                raise ValueError(f"execution_time_ms is {milliseconds}, expected a time of at least 0")
            add(milliseconds)
            return
        if timer is not None:
            ask = timer.elapsed_ms
        elif start is not None and end is not None:
            first, last = start, end

            def ask() -> float | None:
                return first.elapsed_time(last) if last.query() else None

        else:
            raise ValueError("no time: give execution_time_ms, start_event and end_event, or timer")
        self._settle()
        if len(self._pending) == _MOST_PENDING:
            self._pending.popleft()
            self._num_dropped += 1
        self._pending.append((ask, add))

    def _settle(self) -> None:
        """Take what the device has finished: it finishes in order."""
        while self._pending:
            ask, add = self._pending[0]
            milliseconds = ask()
            if milliseconds is None:
                return
            self._pending.popleft()
            add(milliseconds)


class _GroupedRuns:
    """Least squares of one layer's grouped runs: sums alone are kept, and a few runs not yet in them.

    The unknowns are each expert's cost of a token, the cost of an active expert, and a constant.
    """

    def __init__(self, num_experts: int) -> None:
        self.tokens = np.zeros(num_experts)
        self.invocations = np.zeros(num_experts)
        self._products = np.zeros((num_experts + 2, num_experts + 2))
        self._projected = np.zeros(num_experts + 2)
        self._squares = 0.0
        self._recent: list[tuple[_Floats, float]] = []

    def add(self, tokens: _Floats, milliseconds: float) -> None:
        """tokens: [logical]"""
        self.tokens += tokens
        self.invocations += tokens > 0
        self._recent.append((tokens, milliseconds))
        if len(self._recent) >= _MOST_GROUPED:
            self._fold()

    def fit(self) -> tuple[_Floats, float]:
        """Milliseconds of a token, [logical], NaN for an expert without tokens; and the residual."""
        self._fold()
        unknowns = np.concatenate([self.tokens > 0, [True, True]])
        products, projected = self._products[np.ix_(unknowns, unknowns)], self._projected[unknowns]
        # Directions of which the runs say nothing, as experts that always get the same tokens, stay with the
        # cost that all experts have in common.
        common = np.zeros(len(projected))
        total = self._common_products()
        solved = np.linalg.lstsq(total, self._common_projected(), rcond=1e-12)[0]
        common[:-2] = max(float(solved[0]), 0.0)
        common[-2:] = np.maximum(solved[1:], 0.0)
        found = _not_negative(products, projected, common)
        left = self._squares - 2 * found @ projected + found @ products @ found
        residual = float(np.sqrt(max(left, 0.0) / self._squares)) if self._squares else 0.0
        cost = np.full(len(self.tokens), np.nan)
        cost[self.tokens > 0] = found[:-2]
        return cost, residual

    def _common_products(self) -> _Floats:
        """As if all experts had one cost of a token: the first unknown is the sum of theirs."""
        merged = np.add.reduceat(self._products, (0, len(self.tokens), len(self.tokens) + 1), axis=0)
        return np.asarray(np.add.reduceat(merged, (0, len(self.tokens), len(self.tokens) + 1), axis=1))

    def _common_projected(self) -> _Floats:
        return np.add.reduceat(self._projected, (0, len(self.tokens), len(self.tokens) + 1))

    def _fold(self) -> None:
        if not self._recent:
            return
        tokens = np.stack([run for run, _ in self._recent])
        times = np.array([milliseconds for _, milliseconds in self._recent])
        active = (tokens > 0).sum(axis=1, keepdims=True)
        rows = np.concatenate([tokens, active, np.ones_like(active)], axis=1)
        self._products += rows.T @ rows
        self._projected += rows.T @ times
        self._squares += float(times @ times)
        self._recent.clear()


def _not_negative(products: _Floats, projected: _Floats, common: _Floats) -> _Floats:
    """The least squares without negative unknowns: those that come out negative are 0, the rest fits anew.

    products, projected: [unknowns, unknowns] and [unknowns], of the normal equations
    common: [unknowns], where a slight pull leads
    """
    found = np.zeros_like(common)
    ridge = _RIDGE * np.maximum(np.diag(products), 1e-300)
    free = np.ones(len(common), dtype=np.bool_)
    while free.any():
        some = np.ix_(free, free)
        target = projected[free] + ridge[free] * common[free]
        solved = np.linalg.solve(products[some] + np.diag(ridge[free]), target)
        if (solved >= 0).all():
            found[free] = solved
            break
        free[np.flatnonzero(free)[solved < 0]] = False
    return found
