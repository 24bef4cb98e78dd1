"""Measuring what experts cost while a model serves, and what all ranks together know of it.

The model times its experts in the passes that are measured, with timers of the device that were made before.
Between two passes the times that the device knows by then go into this rank's profile; in a cycle, in the
background, the profiles of all ranks are added up. Nothing waits for the device, and the forward path has no
collective.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from eplb_platform.algorithms.compute_aware import cost_factors
from eplb_platform.cost import ExpertComputeProfiler
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime.ports import ExpertLoad

if TYPE_CHECKING:
    import torch

    from eplb_platform.backend import Backend, DeviceTimer

NS_PER_MS = 1e6
MOST_PASSES_IN_FLIGHT = 8
"""Measured passes whose times the device does not know yet; with more, passes are not measured."""
FACTOR_STEPS = 1024
"""Costs are rounded to such parts of the mean token's: every rank weighs alike, whatever its processor."""
CALIBRATION_RUNS = 200
LAYERS_IN_TURN = 2
"""Where each expert is timed by itself, a measured pass times every second layer, the next one the others."""


class PassTimers(Protocol):
    """The timers of one pass on this rank."""

    num_timers: int

    def begin(self, experts: NDArray[np.int64]) -> None:
        """The pass is about to run; experts: [layers, slots], the logical expert of each, -1 for none."""
        ...

    def end(self) -> None:
        """The pass has been enqueued."""
        ...

    def read_into(self, profiler: ExpertComputeProfiler) -> float | None:
        """Hand over what was timed and return its milliseconds; None, and nothing, while the device has not
        passed it.
        """
        ...


class ComputeProfiling:
    """One rank's part in measuring; made by `start_balancer`, asked by the model for timers.

    rank: of this process
    alpha: share of the cost in the load that plans are made from: 0 tokens alone, 1 cost alone
    """

    def __init__(self, profiler: ExpertComputeProfiler, rank: int, alpha: float) -> None:
        self.profiler = profiler
        self.alpha = alpha
        self.current: PassTimers | None = None
        """The timers of the pass that runs, None where it is not measured. Forward thread."""
        self.measured_passes = 0
        self.measured_ms = 0.0
        """What experts took on this rank in all measured passes."""
        self._rank = rank
        self._make: Callable[[], PassTimers] | None = None
        self._made = 0
        self._timer_ns = 0.0
        self._free: list[PassTimers] = []
        self._in_flight: deque[PassTimers] = deque()
        self._map: ExpertMap | None = None
        self._experts = np.zeros((0, 0), dtype=np.int64)
        self._merged: NDArray[np.int64] | None = None

    # --- the model's and the balancer's calls, on the forward thread ---

    def time_with(self, make: Callable[[], PassTimers], timer: DeviceTimer) -> None:
        """The model's timers; `timer`, one of them, is tried here to know what timing itself costs."""
        started = time.thread_time_ns()
        for _ in range(CALIBRATION_RUNS):
            timer.start()
            timer.stop()
        self._timer_ns = (time.thread_time_ns() - started) / CALIBRATION_RUNS
        self._make = make

    def begin_pass(self, expert_map: ExpertMap) -> None:
        """The next forward pass is about to run, by this map."""
        self.profiler.on_forward_pass_start()
        if self._make is None or not self.profiler.should_profile_this_pass():
            return
        started = time.thread_time_ns()
        timers = self._take_timers()
        if timers is None:
            self.profiler.count_dropped()
        else:
            self.current = timers
            self.follow(expert_map)
        self.profiler.count_overhead(time.thread_time_ns() - started)

    def follow(self, expert_map: ExpertMap) -> None:
        """The next pass runs by this map, whatever was said when it began."""
        if self.current is None:
            return
        if expert_map is not self._map:
            self._map = expert_map
            self._experts = expert_map.by_rank()[:, self._rank].astype(np.int64)
        self.current.begin(self._experts)

    def end_pass(self) -> None:
        """The forward pass has ended on this thread; take what the device has finished."""
        if self.current is None and not self._in_flight:
            return
        started = time.thread_time_ns()
        counted = self.profiler.overhead_ms
        if self.current is not None:
            self.current.end()
            self._in_flight.append(self.current)
            self.current = None
        while self._in_flight and (spent := self._in_flight[0].read_into(self.profiler)) is not None:
            timers = self._in_flight.popleft()
            self._free.append(timers)
            self.measured_passes += 1
            self.measured_ms += spent
            self.profiler.count_overhead(int(timers.num_timers * self._timer_ns))
        took = time.thread_time_ns() - started
        # What the profiler has counted of itself meanwhile is part of it.
        already = int((self.profiler.overhead_ms - counted) * NS_PER_MS)
        self.profiler.count_overhead(max(0, took - already))

    def discard_pass(self) -> None:
        """What ran since the last pass was no forward pass to be measured."""
        if self.current is not None:
            self._free.append(self.current)
            self.current = None

    def _take_timers(self) -> PassTimers | None:
        if self._free:
            return self._free.pop()
        if self._make is None or self._made == MOST_PASSES_IN_FLIGHT:
            return None
        self._made += 1
        return self._make()

    # --- the cycle's calls, in the background ---

    def totals(self) -> NDArray[np.int64]:
        """[3, layers, logical]: nanoseconds, tokens and invocations on this rank, to be added over ranks."""
        totals = self.profiler.get_totals()
        totals[0] *= NS_PER_MS
        return np.asarray(np.rint(totals), dtype=np.int64)

    def learn(self, totals: NDArray[np.int64]) -> None:
        """What all ranks measured since the start: the sum of their `totals`."""
        self._merged = totals

    @property
    def cost(self) -> NDArray[np.float64]:
        """[layers, logical], milliseconds of a token over all ranks as of the last cycle, NaN without a
        measurement.
        """
        cost = np.full((self.profiler.num_layers, self.profiler.num_logical_experts), np.nan)
        if self._merged is not None:
            nanoseconds, tokens, _ = self._merged
            np.divide(nanoseconds / NS_PER_MS, tokens, out=cost, where=tokens > 0)
        return cost

    def weigh(self, load: ExpertLoad) -> ExpertLoad:
        """[windows, layers, logical], the load to plan by: tokens blended with their cost by `alpha`."""
        return self._scaled(load, self.alpha)

    def time_load(self, load: ExpertLoad) -> ExpertLoad | None:
        """[windows, layers, logical], in proportion to the time that these tokens take; None when nothing was
        measured yet.
        """
        return None if self._merged is None or not self._merged[1].any() else self._scaled(load, 1.0)

    def _scaled(self, load: ExpertLoad, alpha: float) -> ExpertLoad:
        factors = cost_factors(load.sum(axis=0), self.cost, alpha)
        return np.asarray(load * (np.rint(factors * FACTOR_STEPS) / FACTOR_STEPS))

    # --- what can be seen ---

    def merged_summary(self) -> dict[str, object]:
        """What all ranks measured as of the last cycle, in the layout of `get_statistics_summary`."""
        whole = ExpertComputeProfiler(self.profiler.num_layers, self.profiler.num_logical_experts)
        if self._merged is not None:
            whole.add_totals(self._merged / np.array([NS_PER_MS, 1, 1])[:, None, None])
        return {
            **whole.get_statistics_summary(),
            "forward_pass_count": self.profiler.forward_pass_count,
            "profiling_enabled": self.profiler.profiling_enabled,
        }

    @property
    def measured_share(self) -> float:
        """The part of the model's experts of which some rank has a measurement, as of the last cycle."""
        return 0.0 if self._merged is None else float((self._merged[1] > 0).mean())

    @property
    def residual(self) -> float | None:
        """Mean square root over layers of `grouped_residual` here; None where experts are timed alone."""
        residual = self.profiler.grouped_residual()
        known = residual[np.isfinite(residual)]
        return float(np.sqrt((known**2).mean())) if known.size else None


class LayerSlotTimers:
    """The timers of one layer whose experts run one after the other.

    parts: [part][slot], the stretches of one expert's work
    shared: work on the rows of all experts at once, which each takes its tokens' part of
    tokens: [slots], to be filled by the layer; 0 where an expert did not run
    """

    def __init__(self, backend: Backend, tokens: NDArray[np.int64], num_parts: int) -> None:
        self.parts = [[backend.timer() for _ in tokens] for _ in range(num_parts)]
        self.shared = backend.timer()
        self.tokens = tokens


class SlotTimers:
    """Times the expert of each slot by itself: `PassTimers` for models that compute them one by one.

    A measured pass times one layer in `LAYERS_IN_TURN`; the next one times others.
    """

    def __init__(self, backend: Backend, num_layers: int, num_slots: int, num_parts: int = 1) -> None:
        self._tokens = np.zeros((num_layers, num_slots), dtype=np.int64)
        self._layers = [LayerSlotTimers(backend, tokens, num_parts) for tokens in self._tokens]
        self._parts = [
            [timer for layer in self._layers for timer in layer.parts[part]] for part in range(num_parts)
        ]
        self._experts = np.zeros((0, 0), dtype=np.int64)
        self._turn = 0
        self.num_timers = num_layers * (num_slots * num_parts + 1) // LAYERS_IN_TURN

    def of_layer(self, layer: int) -> LayerSlotTimers | None:
        """The timers of a layer that is to be timed in this pass."""
        return self._layers[layer] if layer % LAYERS_IN_TURN == self._turn else None

    def begin(self, experts: NDArray[np.int64]) -> None:
        self._experts = experts
        self._tokens[:] = 0
        self._turn = (self._turn + 1) % LAYERS_IN_TURN

    def end(self) -> None:
        pass

    def read_into(self, profiler: ExpertComputeProfiler) -> float | None:
        busy = np.flatnonzero(self._tokens).tolist()
        milliseconds = np.zeros(self._tokens.size)
        # The device finishes in order: the last timer tells of all.
        if busy and self._parts[-1][busy[-1]].elapsed_ms() is None:
            return None
        for timers in self._parts:
            milliseconds[busy] += np.array([timers[slot].elapsed_ms() for slot in busy], dtype=np.float64)
        milliseconds = milliseconds.reshape(self._tokens.shape)
        rows = self._tokens.sum(axis=1, keepdims=True)
        shared = np.zeros(rows.shape)
        for layer in np.flatnonzero(rows).tolist():
            shared[layer] = self._layers[layer].shared.elapsed_ms()
        milliseconds += self._tokens * (shared / np.maximum(rows, 1))
        profiler.profile_pass(self._experts, self._tokens, milliseconds)
        return float(milliseconds.sum())


class KernelTimers:
    """Times the kernel that computes all experts of a layer: `PassTimers` for models with grouped kernels.

    timers: [layers], started and stopped by the layers
    tokens: [layers, slots] on the device, to be filled by them
    """

    def __init__(self, backend: Backend, num_layers: int, num_slots: int, device: torch.device) -> None:
        import torch

        from eplb_platform.runtime.deferred_reads import DeferredReader

        self.timers: Sequence[DeviceTimer] = [backend.timer() for _ in range(num_layers)]
        self.tokens = torch.zeros(num_layers, num_slots, dtype=torch.int64, device=device)
        self.num_timers = num_layers
        self.was_timed = [False] * num_layers
        """[layers], to be set by a layer that ran."""
        self._experts = np.zeros((0, 0), dtype=np.int64)
        self._reader: DeferredReader[None] = DeferredReader(
            backend, self.tokens.shape, self.tokens.dtype, depth=1
        )
        self._counts: NDArray[np.int64] | None = None

    def begin(self, experts: NDArray[np.int64]) -> None:
        self._experts, self._counts = experts, None
        self.was_timed[:] = [False] * len(self.was_timed)
        self.tokens.zero_()

    def end(self) -> None:
        self._reader.put(self.tokens, None)

    def read_into(self, profiler: ExpertComputeProfiler) -> float | None:
        for _, counts in self._reader.ready():
            self._counts = counts.astype(np.int64)
        if self._counts is None:
            return None
        times = [
            timer.elapsed_ms() if timed else 0.0
            for timer, timed in zip(self.timers, self.was_timed, strict=True)
        ]
        if None in times:
            return None
        milliseconds = np.array(times, dtype=np.float64)
        profiler.profile_grouped_pass(self._experts, self._counts, milliseconds)
        return float(milliseconds.sum())
