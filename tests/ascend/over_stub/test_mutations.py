"""Each wait for an event, each check of NZ and of an option in the Ascend backend is needed."""

from __future__ import annotations

import inspect
import re
from importlib import import_module

import pytest

from eplb_platform.testing.processes import RankPool
from tests.ascend.over_stub.mutations import MUTATIONS, Mutation
from tests.ascend.over_stub.scenarios import SCENARIOS, faults_of

TRIES = 20


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if not name.startswith("swap")])
def test_nothing_goes_wrong(pair: RankPool, scenario: str) -> None:
    assert pair.run(faults_of, scenario) == [[], []]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_something_does_without_it(pair: RankPool, mutation: Mutation) -> None:
    """Streams only dawdle: once in a while all goes well by luck, and more often beside others' work."""
    for _ in range(TRIES):
        found = pair.run(faults_of, mutation.scenario, mutation)
        if any(found):
            break
    assert any(found), "all went well, again and again"
    print(*found, sep="\n")


WAIT_OR_CHECK = re.compile(
    r"\b(wait_on_host|wait_event|synchronize|query|record_stream"
    r"|check_(whole|parameter|same_format|has_effect|nothing_waits|outlasts))\("
)


@pytest.mark.parametrize("module", sorted({mutation.module for mutation in MUTATIONS}))
def test_no_wait_and_no_check_is_left_out(module: str) -> None:
    removed = [mutation.line for mutation in MUTATIONS if mutation.module == module]
    source = inspect.getsource(import_module(module))
    found = [line.strip() for line in source.splitlines() if WAIT_OR_CHECK.search(line)]
    calls = [line for line in found if not line.startswith("def ")]
    assert [call for call in calls if not any(line in call or call in line for line in removed)] == []
