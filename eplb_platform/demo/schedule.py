"""What is served when: batches of prompts whose mix of texts changes. The same in every phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_platform.demo.settings import Serving


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
    kinds: tuple[int, ...]
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
    """Three mixes one after the other: the first half of the kinds, the second half, then all of them."""
    half = (len(texts) + 1) // 2
    mixes = [tuple(range(half)), tuple(range(half, len(texts))), tuple(range(len(texts)))]
    mixes = [mix for mix in mixes if mix] if len(texts) > 1 else mixes[:1]
    bounds = [round(steps * i / len(mixes)) for i in range(len(mixes) + 1)]
    return tuple(
        Stretch(start, end, kinds, _label(texts, kinds))
        for start, end, kinds in zip(bounds, bounds[1:], mixes, strict=False)
    )


def _label(texts: Sequence[Text], kinds: Sequence[int]) -> str:
    if len(kinds) == len(texts) > 1:
        return "all texts"
    return " + ".join(texts[kind].name for kind in kinds)


def plan_serving(texts: Sequence[Text], *, ranks: int, steps: int, serving: Serving, seed: int) -> Schedule:
    """Draw the prompts of every batch of a phase: `steps` forward passes, the same number on every rank."""
    mixes = stretches(texts, steps)
    rng = np.random.default_rng(seed)
    batches = []
    for stretch in mixes:
        for start in range(stretch.start, stretch.end, serving.forwards_per_batch):
            forwards = min(serving.forwards_per_batch, stretch.end - start)
            prompts = _draw_prompts([texts[kind] for kind in stretch.kinds], ranks, serving, rng)
            batches.append(Batch(start, forwards, prompts))
    return Schedule(mixes, tuple(batches), steps)


def _draw_prompts(
    texts: Sequence[Text], ranks: int, serving: Serving, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Chunks of text from random places; every kind gets an equal share of the sequences."""
    sequences = serving.sequences_of_rank(ranks)
    count = ranks * sequences
    kinds = rng.permutation(np.arange(count) % len(texts))
    prompts = np.empty((count, serving.prompt_tokens), dtype=np.uint8)
    for row, kind in enumerate(kinds):
        data = texts[kind].data
        start = rng.integers(0, len(data) - serving.prompt_tokens)
        prompts[row] = data[start : start + serving.prompt_tokens]
    return prompts.reshape(ranks, sequences, serving.prompt_tokens)
