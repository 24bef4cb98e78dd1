"""What experts cost to compute: measured while serving, for planning by time instead of tokens.

The methods have the names of SGLang's proposal for compute-cost-aware balancing. Experts are logical ones, so
that replicas are merged and a rearrangement loses nothing. No method waits for the device.

Times are those of a busy machine, on which a measurement may be interrupted and take many times as long. What
comes pass by pass is therefore looked at in blocks of passes, and none counts as more than a few times the
median of its block.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_platform.cost_fit import CostFit, GroupedRuns

_Floats: TypeAlias = NDArray[np.float64]

# Measurements that wait for the device.
_MOST_PENDING = 4096
# Passes, and runs of grouped kernels of a layer, that wait to be added up.
BLOCK_PASSES = 32
# An interrupted measurement counts as this many times the median of its block.
_MOST_OF_MEDIAN = 3.0


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

    Times come from the thread that runs the model; what was learnt may be asked for from another one. Raises
    ValueError for counts out of range.
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
        self._lock = threading.Lock()
        self._block: _PassBlock | None = None
        self._grouped_block: _PassBlock | None = None
        self._clear()

    @property
    def profiling_enabled(self) -> bool:
        """Whether measurements are taken now."""
        return self._started

    @property
    def forward_pass_count(self) -> int:
        """Forward passes since the start or `reset_statistics`."""
        return self._forward_pass_count

    @property
    def overhead_ms(self) -> float:
        """Processor time that the profiler itself took so far, on the calling threads."""
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
        started = time.thread_time_ns()
        if not (0 <= layer_idx < self.num_layers and 0 <= expert_idx < self.num_logical_experts):
            raise ValueError(
                f"layer {layer_idx}, expert {expert_idx}: expected below {self.num_layers} and "
                f"{self.num_logical_experts}"
            )
        if num_tokens < 0:
            raise ValueError(f"layer {layer_idx}, expert {expert_idx}: {num_tokens} tokens")

        def add(milliseconds: float) -> None:
            self._totals[:, layer_idx, expert_idx] += (milliseconds, num_tokens, 1)

        with self._lock:
            self._measured(execution_time_ms, start_event, end_event, timer, add)
        self.count_overhead(time.thread_time_ns() - started)

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
        see `CostFit`. Errors as of `profile_expert_execution`.
        """
        if not self.should_profile_this_pass():
            return
        started = time.thread_time_ns()
        tokens = np.array(num_tokens, dtype=np.float64)
        if not 0 <= layer_idx < self.num_layers or tokens.shape != (self.num_logical_experts,):
            raise ValueError(
                f"layer {layer_idx}, tokens {list(tokens.shape)}: expected below {self.num_layers} and "
                f"[{self.num_logical_experts}]"
            )
        if not (np.isfinite(tokens).all() and (tokens >= 0).all()):
            raise ValueError(f"layer {layer_idx}: num_tokens has a count that is not possible")

        def add(milliseconds: float) -> None:
            runs = self._single_runs.setdefault(layer_idx, [])
            runs.append((tokens, milliseconds))
            if len(runs) >= BLOCK_PASSES:
                self._fold_single_runs(layer_idx)

        with self._lock:
            self._measured(execution_time_ms, start_event, end_event, timer, add)
        self.count_overhead(time.thread_time_ns() - started)

    def profile_pass(
        self, experts: NDArray[np.int64], num_tokens: NDArray[np.int64], milliseconds: _Floats
    ) -> None:
        """Add one pass in which the experts of this rank's slots were timed one by one.

        All [layers, slots]: the logical expert of each slot, -1 for none; the tokens that it computed, 0
        where it was not timed; and its time. Whether the pass is one to measure is for the caller to ask.
        Raises ValueError for arrays of other shapes.
        """
        started = time.thread_time_ns()
        with self._lock:
            if self._block is None or not self._block.is_of(experts):
                self._fold_block()
                self._block = _PassBlock(self.num_layers, experts, experts.shape)
            self._block.add(num_tokens, milliseconds)
            if self._block.is_full:
                self._fold_block()
        self.count_overhead(time.thread_time_ns() - started)

    def profile_grouped_pass(
        self, experts: NDArray[np.int64], num_tokens: NDArray[np.int64], milliseconds: _Floats
    ) -> None:
        """Add one pass in which a kernel computed all experts of a layer's slots on this rank.

        experts, num_tokens: [layers, slots] as of `profile_pass`; milliseconds: [layers], 0 where a layer was
        not timed. See `profile_grouped_execution`.
        """
        started = time.thread_time_ns()
        with self._lock:
            if self._grouped_block is None or not self._grouped_block.is_of(experts):
                self._fold_grouped_block()
                self._grouped_block = _PassBlock(self.num_layers, experts, experts.shape[:1])
            self._grouped_block.add(num_tokens, milliseconds)
            if self._grouped_block.is_full:
                self._fold_grouped_block()
        self.count_overhead(time.thread_time_ns() - started)

    def count_overhead(self, nanoseconds: int) -> None:
        """Time that measuring took from the thread that runs the model, beyond what is counted here."""
        self._overhead_ns += nanoseconds

    def count_dropped(self) -> None:
        """A pass to be measured was not, since the device was too far behind."""
        self._num_dropped += 1

    def grouped_residual(self) -> _Floats:
        """[layers], how much of the grouped kernels' time the fit does not explain: `CostFit.residual`.

        NaN without such measurements.
        """
        self._settle_all()
        residual = np.full(self.num_layers, np.nan)
        for layer in list(self._grouped):
            residual[layer] = self._fitted(layer).residual
        return residual

    def get_totals(self) -> _Floats:
        """[3, layers, logical]: milliseconds, tokens and invocations of each expert.

        The sum of the totals of all ranks is the profile of all: see `add_totals`. Grouped runs stand in it
        with the time of their fit, without the constant, which no placement changes.
        """
        self._settle_all()
        with self._lock:
            totals = self._totals.copy()
        for layer in list(self._grouped):
            fit = self._fitted(layer)
            totals[:, layer, fit.experts] += (fit.milliseconds, fit.tokens, fit.invocations)
        return totals

    def add_totals(self, totals: ArrayLike) -> None:
        """Add what other ranks measured, [3, layers, logical] as of `get_totals`. Raises ValueError."""
        added = np.asarray(totals, dtype=np.float64)
        if added.shape != self._totals.shape or not np.isfinite(added).all() or (added < 0).any():
            raise ValueError(f"totals are {list(added.shape)}, expected finite {list(self._totals.shape)}")
        with self._lock:
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
        with self._lock:
            self._totals = np.zeros((3, self.num_layers, self.num_logical_experts))
            self._grouped: dict[int, GroupedRuns] = {}
            self._single_runs: dict[int, list[tuple[_Floats, float]]] = {}
            self._block = self._grouped_block = None
            self._pending: deque[tuple[Callable[[], float | None], Callable[[float], None]]] = deque()
            self._num_dropped = 0
            self._forward_pass_count = 0
            self._overhead_ns = 0
            self._started = self.enable_profiling and self.warmup_steps == 0

    # --- adding up, with the lock held ---

    def _fold_block(self) -> None:
        if self._block is None:
            return
        block, self._block = self._block, None
        tokens, milliseconds = block.num_tokens, _without_interruptions(block.num_tokens, block.milliseconds)
        layers, slots = np.nonzero(block.experts >= 0)
        for total, counts in zip(self._totals, (milliseconds, tokens, tokens > 0), strict=True):
            np.add.at(total, (layers, block.experts[layers, slots]), counts.sum(axis=0)[layers, slots])

    def _fold_grouped_block(self) -> None:
        if self._grouped_block is None:
            return
        block, self._grouped_block = self._grouped_block, None
        for layer, experts in enumerate(block.experts):
            timed, held = block.milliseconds[:, layer] > 0, experts >= 0
            if timed.any() and held.any():
                self._grouped.setdefault(layer, GroupedRuns()).add(
                    experts[held],
                    block.num_tokens[timed, layer][:, held].astype(np.float64),
                    block.milliseconds[timed, layer],
                )

    def _fold_single_runs(self, layer: int) -> None:
        runs = [(tokens, spent) for tokens, spent in self._single_runs.pop(layer, ()) if spent > 0]
        if not runs:
            return
        tokens = np.stack([of_run for of_run, _ in runs])
        experts = np.flatnonzero(tokens.any(axis=0))
        spent = np.array([spent for _, spent in runs])
        self._grouped.setdefault(layer, GroupedRuns()).add(experts, tokens[:, experts], spent)

    def _settle_all(self) -> None:
        """Take what the device has finished, and add up what waits for its block to fill."""
        with self._lock:
            self._settle()
            self._fold_block()
            self._fold_grouped_block()
            for layer in list(self._single_runs):
                self._fold_single_runs(layer)

    def _fitted(self, layer: int) -> CostFit:
        """Solved without the lock: the thread that runs the model does not wait for it."""
        with self._lock:
            runs = self._grouped[layer].copy()
        fit = runs.fit()
        with self._lock:
            self._grouped[layer].remember(fit, runs)
        return fit

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


class _PassBlock:
    """Consecutive measured passes under one placement, not yet added up."""

    def __init__(self, num_layers: int, experts: NDArray[np.int64], timed_shape: tuple[int, ...]) -> None:
        if experts.ndim != 2 or len(experts) != num_layers:
            raise ValueError(f"experts is {list(experts.shape)}, expected [{num_layers}, slots]")
        self.experts = experts
        self._num_tokens = np.zeros((BLOCK_PASSES, *experts.shape), dtype=np.int64)
        self._milliseconds = np.zeros((BLOCK_PASSES, *timed_shape))
        self._passes = 0

    def is_of(self, experts: NDArray[np.int64]) -> bool:
        """Whether the slots hold these experts."""
        return experts is self.experts or np.array_equal(experts, self.experts)

    def add(self, num_tokens: NDArray[np.int64], milliseconds: _Floats) -> None:
        for name, given, kept in (
            ("num_tokens", num_tokens, self._num_tokens),
            ("milliseconds", milliseconds, self._milliseconds),
        ):
            if given.shape != kept.shape[1:]:
                raise ValueError(f"{name} is {list(given.shape)}, expected {list(kept.shape[1:])}")
            kept[self._passes] = given
        self._passes += 1

    @property
    def is_full(self) -> bool:
        return self._passes == BLOCK_PASSES

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[passes, layers, slots]"""
        return self._num_tokens[: self._passes]

    @property
    def milliseconds(self) -> _Floats:
        """[passes, layers, slots] or [passes, layers]"""
        return self._milliseconds[: self._passes]


def _without_interruptions(tokens: NDArray[np.int64], milliseconds: _Floats) -> _Floats:
    """[passes, layers, slots], none far above what its tokens, or any number of them, take at the median."""
    measured = tokens > 0
    per_token = np.divide(milliseconds, tokens, out=np.full(tokens.shape, np.inf), where=measured)
    usual = np.maximum(
        _median(per_token, measured) * tokens,
        _median(np.where(measured, milliseconds, np.inf), measured),
    )
    return np.where(measured, np.minimum(milliseconds, _MOST_OF_MEDIAN * usual), 0.0)


def _median(values: _Floats, measured: NDArray[np.bool_]) -> _Floats:
    """Over the passes that were measured, the lower of two; 0 without any. The others stand as infinite."""
    middle = np.maximum(measured.sum(axis=0) - 1, 0) // 2
    found = np.take_along_axis(np.sort(values, axis=0), middle[None], axis=0)[0]
    return np.where(measured.any(axis=0), found, 0.0)
