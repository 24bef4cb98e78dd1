"""TensorRT-LLM's documented flow, from its statistics to its map, as the benchmark of that name runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from eplb_platform.cli import run
from eplb_platform.topology import Topology

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tensorrt_llm_flow.py"


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark, whose commands run in this process."""
    spec = spec_from_file_location("tensorrt_llm_flow", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def eplb(*arguments: str) -> str:
        shown = StringIO()
        with redirect_stdout(shown):
            assert run(list(arguments)) == 0
        return shown.getvalue()

    monkeypatch.setattr(module, "eplb", eplb)
    yield module


def test_the_greedy_reference_places_by_hand(flow: ModuleType) -> None:
    """Expert 0 gets both further slots (8 / 3 > 2), then: 4 | 8/3 8/3 8/3 | 2 onto the least loaded."""
    placed = flow.greedy_map(np.array([[8.0, 4.0, 2.0, 1.0]]), Topology(2), 3)
    assert np.sort(placed.by_rank()[0], axis=1).tolist() == [[0, 1, 3], [0, 0, 2]]


@pytest.mark.parametrize(("kind", "part"), [("steady", 1.03), ("drifting", 0.7)])
def test_ours_is_at_or_below_the_greedy_on_iterations_not_planned_on(
    kind: str, part: float, flow: ModuleType, tmp_path: Path
) -> None:
    """On steady load what is left is sampling noise, in which the two are equal; on load that changes, a plan
    that sees windows of it does better.
    """
    before, greedy, ours = flow.flow(tmp_path, flow.recorded_load(kind, 3, 160, 0))
    assert ours <= greedy * part and greedy < before * 0.6
    written = yaml.safe_load((tmp_path / "ours.yaml").read_text())
    assert written["num_slots"] == 288
    assert sorted(written["initial_global_assignments"]) == [3, 4, 5]
