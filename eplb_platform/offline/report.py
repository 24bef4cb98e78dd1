"""What recorded load says of an expert map: rank loads, balancedness, drift, hottest experts.

The rank statistics are TensorRT-LLM's: taken at every step and then averaged over the steps. They are made
for any number of layouts at once, in one pass over the trace and in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.balance import mean_over_max
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records.load_trace import LoadTrace, release_pages

PHASES = ("prefill", "decode", "mixed")
_Floats = NDArray[np.float64]
_CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False)
class RankStatistics:
    """The load of the active ranks, all [layers], each taken at every step and averaged over the steps.

    mean, std: tokens of a rank, and their sample standard deviation over the ranks
    imbalance_ratio: (hottest rank - mean) / mean, 0 where there is no load
    balancedness: sum over the steps of the mean / sum over the steps of the hottest rank: 1 is perfect, and
        1 - balancedness is the part of the time that the mean rank waits for the hottest
    """

    num_steps: int
    mean: _Floats
    std: _Floats
    imbalance_ratio: _Floats
    balancedness: _Floats


@dataclass(frozen=True, eq=False)
class LayoutReport:
    """One expert map under the load.

    overall: over all steps; by_phase: over the steps of each phase that there is
    rank_load: [bins, layers, ranks], tokens of each active rank in a step, averaged over each bin of time
    """

    name: str
    expert_map: ExpertMap
    overall: RankStatistics
    by_phase: Mapping[str, RankStatistics]
    rank_load: _Floats


@dataclass(frozen=True, eq=False)
class Report:
    """What a trace, or a part of it, says.

    first_layer: the number of the first MoE layer in the model; first_iteration: of the first step
    num_steps: steps that count; num_idle_steps: those without a token, which do not
    expert_load: [layers, logical], tokens per expert, summed; by_phase the same for each phase
    drift: [layers], how much the shares of the experts change from one window of time to the next (total
        variation, 0 to 1, averaged); NaN with fewer than two windows
    chance: [layers], the drift that independent draws from unchanging shares would show
    """

    first_layer: int
    first_iteration: int
    num_steps: int
    num_idle_steps: int
    num_windows: int
    expert_load: _Floats
    by_phase: Mapping[str, _Floats]
    drift: _Floats
    chance: _Floats
    layouts: tuple[LayoutReport, ...]

    def hottest_experts(self, layer: int, count: int) -> list[tuple[int, float]]:
        """The experts with most load, each with its load / the mean expert's; none where there is no load."""
        load = self.expert_load[layer]
        hottest = np.argsort(-load, kind="stable")[:count]
        mean = load.mean()
        return [(int(expert), float(load[expert] / mean)) for expert in hottest if load[expert] > 0]


def make_report(
    trace: LoadTrace,
    layouts: Mapping[str, ExpertMap],
    *,
    iterations: range | None = None,
    num_windows: int = 16,
    num_bins: int = 60,
) -> Report:
    """The report on the steps of `trace` that are in `iterations`, all by default.

    layouts: expert maps for the trace's layers and experts, by name
    iterations: numbers of steps, counted from the trace's first_iteration, 0 where it has none
    num_windows: equal parts of the steps that drift is taken between
    num_bins: equal parts of the steps in `rank_load`, at most

    Raises ValueError for a map of another shape, and when no step in `iterations` has a token.
    """
    for name, expert_map in layouts.items():
        shape = (expert_map.num_layers, expert_map.num_logical_experts)
        if shape != trace.expert_load.shape[1:]:
            expected = list(trace.expert_load.shape[1:])
            raise ValueError(f"{name} has [layers, experts] {list(shape)}, the load has {expected}")
    first = metadata_number(trace, "first_iteration")
    counting = steps_of(trace, iterations)
    start, stop = counting.start, counting.stop
    counted = _Counted(trace, stop - start, num_windows)
    tallies = [_Tally(expert_map, stop - start, num_bins) for expert_map in layouts.values()]
    for at, load in _chunks(trace, start, stop):
        phase = trace.phase[start + at : start + at + load.shape[1]]
        has_tokens = counted.add(at, load, phase)
        for tally in tallies:
            tally.add(at, load, phase, has_tokens)
    if not counted.num_steps:
        raise ValueError(f"no token in iterations {first + start} to {first + stop - 1}")
    drift, chance = _drift(counted.windows)
    return Report(
        first_layer=metadata_number(trace, "first_moe_layer"),
        first_iteration=first + start,
        num_steps=counted.num_steps,
        num_idle_steps=stop - start - counted.num_steps,
        num_windows=len(counted.windows),
        expert_load=counted.windows.sum(axis=0),
        by_phase={name: load for name, load in zip(PHASES, counted.by_phase, strict=True) if load.any()},
        drift=drift,
        chance=chance,
        layouts=tuple(
            tally.report(name, expert_map)
            for tally, (name, expert_map) in zip(tallies, layouts.items(), strict=True)
        ),
    )


def metadata_number(trace: LoadTrace, key: str) -> int:
    """The number that the trace's metadata have under `key`; 0 where they have none."""
    text = trace.metadata.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def steps_of(trace: LoadTrace, iterations: range | None) -> range:
    """The steps of the trace that are in `iterations`, all by default.

    iterations: counted from the trace's first_iteration, 0 where it has none. Raises ValueError for none.
    """
    first = metadata_number(trace, "first_iteration")
    start, stop = 0, trace.num_steps
    if iterations is not None:
        start, stop = max(0, iterations.start - first), min(stop, iterations.stop - first)
    if start >= stop:
        asked = "" if iterations is None else f" in iterations {iterations.start}-{iterations.stop}"
        raise ValueError(f"no step{asked}, the load has {first}-{first + trace.num_steps}")
    return range(start, stop)


def rank_share(expert_map: ExpertMap) -> _Floats:
    """[layers, logical, active ranks], the part of each expert's load that each rank computes."""
    topology = expert_map.topology
    share = np.zeros((expert_map.num_layers, expert_map.num_logical_experts, topology.num_ranks))
    by_rank = expert_map.by_rank()[:, topology.is_active]
    layer = np.arange(expert_map.num_layers)[:, None, None]
    rank = np.flatnonzero(topology.is_active)[None, :, None]
    np.add.at(share, (layer, by_rank, rank), 1.0)
    return np.asarray(share[:, :, topology.is_active] / expert_map.replica_count[:, :, None])


class _Counted:
    """Loads of experts, summed by window and by phase."""

    def __init__(self, trace: LoadTrace, num_steps: int, num_windows: int) -> None:
        shape = trace.expert_load.shape[1:]
        self.num_steps = 0
        self.windows = np.zeros((min(num_windows, num_steps), *shape))
        self.by_phase = np.zeros((len(PHASES), *shape))
        self._window_of_step = _parts(num_steps, len(self.windows))

    def add(self, at: int, load: _Floats, phase: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """load: [layers, steps, logical]; returns [steps], whether a step has a token"""
        _add_by(self.windows, self._window_of_step[at : at + load.shape[1]], load)
        for number in range(len(PHASES)):
            if (chosen := phase == number).any():
                part = load if chosen.all() else load[:, chosen]
                self.by_phase[number] += part.sum(axis=1)
        has_tokens = np.asarray((load.max(axis=2) > 0).any(axis=0))
        self.num_steps += int(has_tokens.sum())
        return has_tokens


class _Tally:
    """Sums over the steps of one layout's rank loads."""

    def __init__(self, expert_map: ExpertMap, num_steps: int, num_bins: int) -> None:
        self._share = rank_share(expert_map)
        layers, _, ranks = self._share.shape
        # [phases, sums, layers]: the sums of mean, std, imbalance ratio and hottest rank
        self._sums = np.zeros((len(PHASES), 4, layers))
        self._steps = np.zeros(len(PHASES), dtype=np.int64)
        self._bins = np.zeros((min(num_bins, num_steps), layers, ranks))
        self._bin_of_step = _parts(num_steps, len(self._bins))
        self._steps_of_bin = np.zeros(len(self._bins))

    def add(self, at: int, load: _Floats, phase: NDArray[np.uint8], has_tokens: NDArray[np.bool_]) -> None:
        """load: [layers, steps, logical]; phase, has_tokens: [steps]"""
        rank_load = np.matmul(load, self._share)
        bins = self._bin_of_step[at : at + load.shape[1]]
        _add_by(self._bins, bins, rank_load)
        np.add.at(self._steps_of_bin, bins, has_tokens)
        mean, hottest = rank_load.mean(axis=2), rank_load.max(axis=2)
        ranks = rank_load.shape[2]
        std = rank_load.std(axis=2, ddof=1) if ranks > 1 else np.zeros_like(mean)
        ratio = np.divide(hottest - mean, mean, out=np.zeros_like(mean), where=mean > 0)
        for number in range(len(PHASES)):
            chosen = has_tokens & (phase == number)
            self._steps[number] += chosen.sum()
            for which, values in enumerate((mean, std, ratio, hottest)):
                self._sums[number, which] += values[:, chosen].sum(axis=1)

    def report(self, name: str, expert_map: ExpertMap) -> LayoutReport:
        by_phase = {
            phase: _statistics(sums, int(steps))
            for phase, sums, steps in zip(PHASES, self._sums, self._steps, strict=True)
            if steps
        }
        overall = _statistics(self._sums.sum(axis=0), int(self._steps.sum()))
        steps_of_bin = np.maximum(self._steps_of_bin, 1)[:, None, None]
        return LayoutReport(name, expert_map, overall, by_phase, self._bins / steps_of_bin)


def _statistics(sums: _Floats, num_steps: int) -> RankStatistics:
    mean, std, ratio, hottest = sums
    return RankStatistics(
        num_steps, mean / num_steps, std / num_steps, ratio / num_steps, mean_over_max(mean, hottest)
    )


def _chunks(trace: LoadTrace, start: int, stop: int) -> Iterator[tuple[int, _Floats]]:
    """Steps in pieces of bounded size, as [layers, steps, logical], each with the place of its first step."""
    layers, experts = trace.expert_load.shape[1:]
    steps = max(1, _CHUNK_ENTRIES // (layers * experts))
    for at in range(start, stop, steps):
        chunk = trace.expert_load[at : min(at + steps, stop)]
        load = np.ascontiguousarray(chunk.transpose(1, 0, 2), dtype=np.float64)
        release_pages(trace.expert_load)
        yield at - start, load


def _parts(num_steps: int, num_parts: int) -> NDArray[np.int64]:
    """[steps], the part that each step belongs to: equal ones, in order."""
    return np.arange(num_steps, dtype=np.int64) * num_parts // max(num_steps, 1)


def _add_by(total: _Floats, part_of_step: NDArray[np.int64], values: _Floats) -> None:
    """Add values, [layers, steps, n], to total, [parts, layers, n], by the part that each step belongs to."""
    for part in range(int(part_of_step[0]), int(part_of_step[-1]) + 1):
        first, last = np.searchsorted(part_of_step, [part, part + 1])
        total[part] += values[:, first:last].sum(axis=1)


def _drift(windows: _Floats) -> tuple[_Floats, _Floats]:
    """[layers] each, from [windows, layers, logical]; windows without load are passed over."""
    layers = windows.shape[1]
    drift, chance = np.full(layers, np.nan), np.full(layers, np.nan)
    for layer in range(layers):
        tokens = windows[:, layer].sum(axis=1)
        load, tokens = windows[tokens > 0, layer], tokens[tokens > 0]
        if len(load) < 2:
            continue
        share = load / tokens[:, None]
        drift[layer] = np.abs(np.diff(share, axis=0)).sum(axis=1).mean() / 2
        pooled = load.sum(axis=0) / tokens.sum()
        variance = (pooled * (1 - pooled))[None] * (1 / tokens[1:] + 1 / tokens[:-1])[:, None]
        # The mean of a normal variable's absolute value is sqrt(2 / pi) of its standard deviation.
        chance[layer] = np.sqrt(2 / np.pi * variance).sum(axis=1).mean() / 2
    return drift, chance
