"""Prompts of the six kinds of text that the demo's model was trained on, as token ids (bytes)."""

from __future__ import annotations

import random
from importlib.resources import files

KINDS = ("c", "json", "markup", "prose", "python", "table")


def prompts(kinds: tuple[str, ...], count: int, *, tokens: int = 48, seed: int = 0) -> list[list[int]]:
    """`count` chunks of text, the kinds taken in turn, from places that `seed` draws."""
    texts = {
        kind: (files("eplb_platform.demo") / "texts" / f"{kind}.txt").read_bytes()
        for kind in sorted(set(kinds))
    }
    draw = random.Random(seed)
    chosen = []
    for index in range(count):
        text = texts[kinds[index % len(kinds)]]
        start = draw.randrange(len(text) - tokens)
        chosen.append(list(text[start : start + tokens]))
    return chosen
