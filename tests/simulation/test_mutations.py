"""Each rule, broken in one line, is noticed by the simulation within 500 seeds."""

from __future__ import annotations

import pytest

from tests.simulation.mutant import SEEDS, first_violation
from tests.simulation.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_broken_rule_is_noticed(mutation: Mutation) -> None:
    seeds = [mutation.first_tried, *range(SEEDS)]
    found = first_violation(mutation, seeds)
    assert found is not None, f"no seed notices {mutation.broken.strip()!r}"
    seed, violation = found
    print(f"seed {seed}: {violation}")
