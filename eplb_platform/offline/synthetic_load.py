"""Seeded expert loads, made as a sequence of collections that a balancer would plan on one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Load = NDArray[np.float64]

# From one collection to the next, the experts of a steady load drift by this much (sigma of a lognormal).
_DRIFT = 0.25


@dataclass(frozen=True)
class LoadShape:
    """The size of a load.

    num_groups: expert groups of the router, whose experts are liked together
    num_collections: balancing cycles; num_forwards: forward passes of one
    tokens_per_forward: of one layer, each sent to `experts_per_token` experts
    """

    num_layers: int
    num_experts: int
    num_groups: int = 1
    num_collections: int = 10
    num_forwards: int = 40
    tokens_per_forward: int = 512
    experts_per_token: int = 8

    @property
    def experts_chosen(self) -> int:
        """Choices of a layer in a forward pass."""
        return self.tokens_per_forward * min(self.experts_per_token, self.num_experts)


def zipf(shape: LoadShape, seed: int) -> list[Load]:
    """Exact loads in proportion to 1 / rank in popularity, each collection a drift away from the last."""
    rng = np.random.default_rng(seed)
    popularity = 1e6 / np.arange(1, shape.num_experts + 1)
    return _steady(shape, np.stack([rng.permutation(popularity) for _ in range(shape.num_layers)]), rng)


def lognormal(shape: LoadShape, seed: int) -> list[Load]:
    """Exact lognormal loads (sigma 1), each collection a drift away from the last."""
    rng = np.random.default_rng(seed)
    return _steady(shape, rng.lognormal(size=(shape.num_layers, shape.num_experts)) * 1e4, rng)


def grouped(shape: LoadShape, seed: int) -> list[Load]:
    """The same, where neighbouring experts share a factor (sigma 0.5): those of an expert group, or of an
    eighth where the router has no groups.
    """
    rng = np.random.default_rng(seed)
    experts = rng.lognormal(sigma=0.85, size=(shape.num_layers, shape.num_experts))
    num_groups = shape.num_groups if shape.num_groups > 1 else 8
    by_group = rng.lognormal(sigma=0.5, size=(shape.num_layers, num_groups))
    group_of_expert = np.arange(shape.num_experts) * num_groups // shape.num_experts
    return _steady(shape, experts * by_group[:, group_of_expert] * 1e4, rng)


def drifting(
    shape: LoadShape, seed: int, *, correlation: float = 0.95, spread: float = 0.5, num_domains: int = 6
) -> list[Load]:
    """Sampled tokens of fields of use (domains) whose shares follow an AR(1) process.

    correlation: of a field's logarithm from one forward pass to the next
    spread: sigma of the logarithm by which a field likes an expert more than others do
    """
    rng = np.random.default_rng(seed)
    popularity = _popularity(shape, spread, num_domains, rng)
    state, shares = rng.normal(0, 1, num_domains), []
    for _ in range(shape.num_collections * shape.num_forwards):
        state = correlation * state + np.sqrt(1 - correlation**2) * rng.normal(0, 1, num_domains)
        shares.append(np.exp(1.5 * state))
    return _sampled(shape, popularity, np.array(shares), rng)


def switching(
    shape: LoadShape, seed: int, *, rate: float = 1 / 8, spread: float = 0.5, num_domains: int = 6
) -> list[Load]:
    """Sampled tokens of fields of use of which one rules, with 75 % of the tokens, until another takes over.

    rate: probability that a forward pass draws its ruler anew
    """
    rng = np.random.default_rng(seed)
    popularity = _popularity(shape, spread, num_domains, rng)
    ruling, shares = int(rng.integers(num_domains)), []
    for _ in range(shape.num_collections * shape.num_forwards):
        ruling = int(rng.integers(num_domains)) if rng.random() < rate else ruling
        share = np.full(num_domains, 0.3 / num_domains)
        share[ruling] += 0.7
        shares.append(share)
    return _sampled(shape, popularity, np.array(shares), rng)


# By name: each gives a list of collections, [forwards, layers, logical] tokens; the same seed the same ones.
SYNTHETIC_LOADS: dict[str, Callable[[LoadShape, int], list[Load]]] = {
    "zipf": zipf,
    "lognormal": lognormal,
    "grouped": grouped,
    "drifting": drifting,
    "switching": switching,
}


def _steady(shape: LoadShape, load: Load, rng: np.random.Generator) -> list[Load]:
    """Collections of one forward pass, which stands for as many as there are; load: [layers, logical]."""
    collections = []
    for _ in range(shape.num_collections):
        collections.append(load[None])
        load = load * rng.lognormal(sigma=_DRIFT, size=load.shape)
    return collections


def _popularity(shape: LoadShape, spread: float, num_domains: int, rng: np.random.Generator) -> Load:
    """[domains, layers, logical], how much each field of use likes each expert."""
    base = rng.normal(0, 0.35, (shape.num_layers, shape.num_experts))
    return np.asarray(np.exp(base + rng.normal(0, spread, (num_domains, *base.shape))))


def _sampled(shape: LoadShape, popularity: Load, shares: Load, rng: np.random.Generator) -> list[Load]:
    """Tokens drawn for every forward pass; shares: [forwards of all collections, domains]."""
    mixed = np.einsum("fd,dle->fle", shares, popularity)
    mixed /= mixed.sum(axis=2, keepdims=True)
    tokens = rng.multinomial(shape.experts_chosen, mixed).astype(np.float64)
    return list(tokens.reshape(shape.num_collections, shape.num_forwards, *tokens.shape[1:]))
