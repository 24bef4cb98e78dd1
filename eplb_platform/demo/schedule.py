"""What is served when: batches of prompts whose mix of texts changes. The same in every phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.demo.settings import Serving

MOSTLY = 0.75
"""Share of the sequences that the favoured kinds of text have together."""


@dataclass(frozen=True)
class Text:
    """A kind of text: its name and its bytes."""

    name: str
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class Stretch:
    """Part of a phase with one mix of texts: forward passes from `start` to before `end`."""

    start: int
    end: int
    shares: tuple[float, ...]
    """Of the sequences, for each kind of text; they sum to 1."""
    label: str


@dataclass(frozen=True)
class Batch:
    """Sequences that are served together: one prefill, then decode steps."""

    start: int
    """Its first forward pass, counted from the start of the phase."""
    forwards: int
    prompts: NDArray[np.uint8]
    """[ranks, sequences, prompt tokens]"""


@dataclass(frozen=True)
class RankBatch:
    """What one rank serves of a batch."""

    prompts: NDArray[np.uint8]
    """[sequences, prompt tokens]"""
    forwards: int


@dataclass(frozen=True)
class Schedule:
    stretches: tuple[Stretch, ...]
    batches: tuple[Batch, ...]
    steps: int

    def of_rank(self, rank: int) -> tuple[RankBatch, ...]:
        return tuple(RankBatch(batch.prompts[rank], batch.forwards) for batch in self.batches)


def stretches(texts: Sequence[Text], steps: int) -> tuple[Stretch, ...]:
    """Three mixes one after the other: mostly the first half of the kinds, mostly the second, all alike."""
    kinds, half = range(len(texts)), (len(texts) + 1) // 2
    favoured = (kinds[:half], kinds[half:], kinds) if len(texts) > 1 else (kinds,)
    bounds = [round(steps * i / len(favoured)) for i in range(len(favoured) + 1)]
    return tuple(
        Stretch(start, end, _shares(len(texts), some), _label(texts, some))
        for start, end, some in zip(bounds, bounds[1:], favoured, strict=False)
    )


def _shares(count: int, favoured: range) -> tuple[float, ...]:
    """Equal shares of `MOSTLY` for the favoured kinds, and of the rest for the others."""
    others = count - len(favoured)
    if not others:
        return (1 / count,) * count
    return tuple(
        MOSTLY / len(favoured) if kind in favoured else (1 - MOSTLY) / others for kind in range(count)
    )


def _label(texts: Sequence[Text], favoured: range) -> str:
    names = " + ".join(texts[kind].name for kind in favoured)
    if len(favoured) < len(texts):
        return f"mostly {names}"
    return "all texts alike" if len(texts) > 1 else names


def plan_serving(texts: Sequence[Text], *, ranks: int, steps: int, serving: Serving, seed: int) -> Schedule:
    """Draw the prompts of every batch of a phase: `steps` forward passes, the same number on every rank."""
    mixes = stretches(texts, steps)
    rng = np.random.default_rng(seed)
    batches = []
    for stretch in mixes:
        for start in range(stretch.start, stretch.end, serving.forwards_per_batch):
            forwards = min(serving.forwards_per_batch, stretch.end - start)
            prompts = _draw_prompts(texts, stretch.shares, ranks, serving, rng)
            batches.append(Batch(start, forwards, prompts))
    return Schedule(mixes, tuple(batches), steps)


def _draw_prompts(
    texts: Sequence[Text], shares: Sequence[float], ranks: int, serving: Serving, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Chunks of text from random places, as many of each kind as its share says."""
    sequences = serving.sequences_of_rank(ranks)
    count = ranks * sequences
    # The kind whose share of a ruler from 0 to 1 holds the middle of each sequence's part of it.
    kinds = rng.permutation(np.searchsorted(np.cumsum(shares)[:-1], (np.arange(count) + 0.5) / count))
    prompts = np.empty((count, serving.prompt_tokens), dtype=np.uint8)
    for row, kind in enumerate(kinds):
        data = texts[kind].data
        start = rng.integers(0, len(data) - serving.prompt_tokens)
        prompts[row] = data[start : start + serving.prompt_tokens]
    return prompts.reshape(ranks, sequences, serving.prompt_tokens)
