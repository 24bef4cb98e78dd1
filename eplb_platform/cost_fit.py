"""What grouped kernels tell of single experts: one time for many, over many runs with different tokens.

The time of a run is taken as a constant + for each expert with tokens a cost of being active (its weights are
read once) + its tokens times its cost of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_Floats: TypeAlias = NDArray[np.float64]

# How far an expert's cost is expected from the common one, as part of it, before anything says so.
_SPREAD = 0.5
# The noise decides how far the runs are believed, and what is believed says how much is noise.
_ROUNDS = 4
# Of what runs leave open between constant, token and activation, tokens take most and the constant least.
_PREFERENCE = np.array([1e-4, 1e-9, 1e-6])
# Keeps equations solvable whose runs say nothing at all of some unknown.
_FLOOR = 1e-9


@dataclass(frozen=True)
class CostFit:
    """The costs of one layer's experts in milliseconds, none negative.

    experts: [k], the logical experts that had tokens; the arrays are in this order
    token_cost, activation_cost: [k], of one token, and of a run that the expert takes part in
    constant: of a run, whatever its tokens
    residual: root mean square of (measured - fitted) / measured over the runs; 0 is a perfect fit
    tokens, invocations: [k], over all runs
    """

    experts: NDArray[np.int64]
    token_cost: _Floats
    activation_cost: _Floats
    constant: float
    residual: float
    tokens: _Floats
    invocations: _Floats

    @property
    def milliseconds(self) -> _Floats:
        """[k], what the experts took in all runs; the constant is nobody's."""
        return np.asarray(self.token_cost * self.tokens + self.activation_cost * self.invocations)


class GroupedRuns:
    """Least squares of one layer's runs: only sums are kept, as large as the experts that had tokens.

    Errors count as parts of the measured time, so that a long prefill says no more than a short decode step,
    and a run that was interrupted says little. What the runs leave open, as of experts that always get the
    same share of the tokens, stays near the cost that all experts have in common, the nearer the noisier.
    """

    def __init__(self) -> None:
        self._experts = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros((2, 0))
        # Unknowns: the constant, then of each expert the cost of a token and of being active.
        self._products = np.zeros((1, 1))
        self._projected = np.zeros(1)
        self._runs = 0
        self._fit: CostFit | None = None

    def add(self, experts: NDArray[np.int64], tokens: _Floats, milliseconds: _Floats) -> None:
        """experts: [k], an expert may stand there twice; tokens: [runs, k]; milliseconds: [runs], above 0."""
        columns = self._columns(experts)
        rows = np.zeros((len(tokens), 1 + 2 * len(self._experts)))
        rows[:, 0] = 1
        active = tokens > 0
        for slot, column in enumerate(columns.tolist()):
            rows[:, 1 + 2 * column] += tokens[:, slot]
            rows[:, 2 + 2 * column] += active[:, slot]
        np.add.at(self._counts[0], columns, tokens.sum(axis=0))
        np.add.at(self._counts[1], columns, active.sum(axis=0))
        rows /= milliseconds[:, None]
        self._products += rows.T @ rows
        self._projected += rows.sum(axis=0)
        self._runs += len(rows)
        self._fit = None

    def fit(self) -> CostFit:
        """The costs that explain all runs best."""
        if self._fit is None:
            self._fit = self._solve()
        return self._fit

    def copy(self) -> GroupedRuns:
        """The same runs; adding to one leaves the other as it is."""
        same = GroupedRuns()
        same._experts, same._counts = self._experts, self._counts.copy()
        same._products, same._projected = self._products.copy(), self._projected.copy()
        same._runs, same._fit = self._runs, self._fit
        return same

    def remember(self, fit: CostFit, of: GroupedRuns) -> None:
        """Keep the fit of an earlier copy, unless runs came meanwhile."""
        if self._runs == of._runs:
            self._fit = fit

    def _columns(self, experts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these experts stand, new ones behind the others."""
        new = np.setdiff1d(experts, self._experts)
        if len(new):
            more = len(new)
            self._experts = np.concatenate([self._experts, new])
            self._counts = np.pad(self._counts, ((0, 0), (0, more)))
            self._products = np.pad(self._products, (0, 2 * more))
            self._projected = np.pad(self._projected, (0, 2 * more))
        order = np.argsort(self._experts)
        return np.asarray(order[np.searchsorted(self._experts, experts, sorter=order)])

    def _solve(self) -> CostFit:
        has_tokens = self._counts[0] > 0
        unknowns = np.concatenate([[True], np.repeat(has_tokens, 2)])
        products, projected = self._products[np.ix_(unknowns, unknowns)], self._projected[unknowns]
        common = self._common()
        prior = np.concatenate([common[:1], np.tile(common[1:], int(has_tokens.sum()))])
        found, noise = prior, self._noise(products, projected, prior, 0.0)
        width = np.maximum(_SPREAD * prior, _FLOOR * max(float(prior.max()), _FLOOR))
        width[0] = max(float(prior.max()), _FLOOR) / _FLOOR  # the constant is free
        for _ in range(_ROUNDS):
            ridge = noise / width**2 + _FLOOR * np.diag(products)
            found = _not_negative(products, projected, prior, ridge)
            believed = float(np.trace(np.linalg.solve(products + np.diag(ridge), products)))
            noise = self._noise(products, projected, found, believed)
        residual = float(np.sqrt(self._noise(products, projected, found, 0.0)))
        return CostFit(
            experts=self._experts[has_tokens],
            token_cost=found[1::2],
            activation_cost=found[2::2],
            constant=float(found[0]),
            residual=residual,
            tokens=self._counts[0, has_tokens],
            invocations=self._counts[1, has_tokens],
        )

    def _common(self) -> _Floats:
        """[3]: constant, token, activation, as if all experts cost the same."""
        merge = np.zeros((len(self._products), 3))
        merge[0, 0] = merge[1::2, 1] = merge[2::2, 2] = 1
        products = merge.T @ self._products @ merge
        ridge = _PREFERENCE * np.diag(products)
        return _not_negative(products, merge.T @ self._projected, np.zeros(3), ridge)

    def _noise(self, products: _Floats, projected: _Floats, found: _Floats, believed: float) -> float:
        """Mean square of what `found` leaves unexplained, as parts of the times; the time of a run is 1.

        believed: how many numbers were taken from the runs
        """
        left = self._runs - 2 * found @ projected + found @ products @ found
        return max(float(left), 0.0) / max(self._runs - believed, 1.0)


def _not_negative(products: _Floats, projected: _Floats, prior: _Floats, ridge: _Floats) -> _Floats:
    """The least squares without negative unknowns: those that come out negative are 0, the rest fits anew.

    products, projected: [unknowns, unknowns] and [unknowns], of the normal equations
    prior, ridge: [unknowns], where each is pulled and how strongly
    """
    found = np.zeros_like(prior)
    free = np.ones(len(prior), dtype=np.bool_)
    while free.any():
        some = np.ix_(free, free)
        pull = np.diag(np.maximum(ridge[free], np.finfo(np.float64).tiny))
        solved = np.linalg.solve(products[some] + pull, projected[free] + ridge[free] * prior[free])
        if (solved >= 0).all():
            found[free] = solved
            break
        free[np.flatnonzero(free)[solved < 0]] = False
    return found
