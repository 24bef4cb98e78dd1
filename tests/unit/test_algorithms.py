"""The algorithm interface: input that is refused, discovery, options, what importing costs, slots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_platform.algorithms import (
    Algorithm,
    AlgorithmError,
    discover_algorithms,
    load_algorithm,
    rebalance_experts,
)
from eplb_platform.algorithms.deepseek import DeepSeek
from eplb_platform.algorithms.random_placement import RandomPlacement
from eplb_platform.algorithms.slots import keep_slots
from eplb_platform.balance import moved_experts
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

LOAD = np.arange(1, 17).reshape(2, 8)
TOPOLOGY = Topology(4, 2)


def refuse(match: str, load: object = LOAD, **changed: Any) -> None:
    arguments: dict[str, Any] = {"num_physical_experts": 12, "topology": TOPOLOGY}
    with pytest.raises(ValueError, match=match):
        rebalance_experts(load, **(arguments | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_a_wrong_load_is_named_with_its_place(wrong: float) -> None:
    load = np.ones((3, 2, 8))
    load[2, 1, 5] = wrong
    refuse(f"layer 1, expert 5, window 2 is {wrong}", load)


def test_load_of_another_shape_or_type_is_refused() -> None:
    refuse("shape .8,.", np.ones(8))
    refuse("shape", np.ones((0, 8)))
    refuse("dtype", np.ones((2, 8), dtype=bool))
    refuse("dtype", [["a"] * 8])


def test_slots_that_do_not_fit_are_refused() -> None:
    refuse("13, expected a multiple of the 4 ranks", num_physical_experts=13)
    refuse("8 logical experts do not fit in 1 slots on each of 4 active", num_physical_experts=4)
    refuse("is 0", num_physical_experts=0)
    refuse("8 logical experts do not fit in 3 slots on each of 2", topology=Topology(4, active_ranks=(0, 3)))
    refuse("num_physical_experts is missing", num_physical_experts=None)


def test_groups_that_do_not_divide_the_experts_are_refused() -> None:
    refuse("num_expert_groups is 3, expected a divisor of the 8", num_expert_groups=3)
    refuse("num_expert_groups is 0", num_expert_groups=0)


@pytest.mark.parametrize(
    ("current", "match"),
    [
        (ExpertMap.initial(3, 8, TOPOLOGY, 4), "3 layers"),
        (ExpertMap.initial(2, 12, TOPOLOGY), "12 logical experts"),
        (ExpertMap.initial(2, 8, Topology(2)), "2 ranks"),
    ],
)
def test_a_current_map_of_another_model_is_refused(current: ExpertMap, match: str) -> None:
    refuse(match, current=current)


def test_no_window_yet_is_no_load() -> None:
    current = ExpertMap.initial(2, 8, TOPOLOGY, 4)
    plan = rebalance_experts(np.zeros((0, 2, 8)), topology=TOPOLOGY, current=current)
    assert plan.expert_map == current
    assert plan.balancedness.tolist() == [1.0, 1.0]


def test_the_load_given_is_left_as_it_was() -> None:
    load = np.ones((2, 2, 8))
    load.flags.writeable = False
    rebalance_experts(load, num_physical_experts=12, topology=TOPOLOGY)
    assert (load == 1).all()


def test_moves_of_a_first_plan_are_counted_from_the_initial_layout() -> None:
    plan = rebalance_experts(LOAD, num_physical_experts=12, topology=TOPOLOGY)
    initial = ExpertMap.initial(2, 8, TOPOLOGY, 4)
    assert plan.moved_experts.tolist() == moved_experts(initial, plan.expert_map).tolist()


def test_installed_algorithms_are_found_by_name() -> None:
    found = discover_algorithms()
    assert found["deepseek"] is DeepSeek
    assert found["random"] is RandomPlacement
    assert all(algorithm.name == name for name, algorithm in found.items())
    assert load_algorithm("deepseek") is DeepSeek


def test_an_unknown_name_gets_the_nearest_and_all_known_ones() -> None:
    refuse("no algorithm 'deepseak', did you mean 'deepseek'.*deepseek.*random", algorithm="deepseak")


def test_an_unknown_option_gets_the_known_ones() -> None:
    refuse("'random' has no option 'sed', did you mean 'seed'. .known: seed", algorithm="random", sed=1)
    refuse("'deepseek' has no option 'seed' .known: none", algorithm="deepseek", seed=1)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "1"])
def test_a_seed_out_of_range_is_refused(seed: object) -> None:
    refuse("seed is", algorithm="random", seed=seed)


def python(code: str, *, path: Path | None = None) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path or '.')!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_algorithm_that_fails_to_load_says_why_and_spares_the_others(tmp_path: Path) -> None:
    (tmp_path / "broken_algorithm.py").write_text("raise ImportError('its device library is not here')\n")
    (tmp_path / "not_an_algorithm.py").write_text("thing = 3\n")
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[eplb_platform.algorithms]\nbroken = broken_algorithm:Broken\nthing = not_an_algorithm:thing\n"
    )
    code = """
from eplb_platform.algorithms import AlgorithmError, discover_algorithms, load_algorithm
print(*discover_algorithms())
for name in ("broken", "thing"):
    try:
        load_algorithm(name)
    except AlgorithmError as error:
        print(error)
"""
    found, broken, thing = python(code, path=tmp_path).splitlines()
    assert {"deepseek", "random"} <= set(found.split())
    assert "broken" not in found
    assert "'broken' is installed but cannot be loaded" in broken
    assert "its device library is not here" in broken
    assert "3 is not an Algorithm class" in thing


@pytest.mark.parametrize("module", ["algorithms", "algorithms.deepseek", "heat", "dispatch"])
def test_importing_the_planning_side_loads_neither_numba_nor_torch(module: str) -> None:
    code = f"import eplb_platform.{module}; print([m for m in ('numba', 'torch') if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_kernels_give_the_same_plans_without_compilation() -> None:
    code = """
import numpy as np
from eplb_platform.algorithms import rebalance_experts
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology
topology = Topology(4, 2)
current = ExpertMap.initial(2, 8, topology, 4)
load = np.arange(16).reshape(2, 8) ** 2
plan = rebalance_experts(load, topology=topology, num_expert_groups=2, current=current)
print(plan.expert_map.digest())
"""
    disabled = f"import os; os.environ['NUMBA_DISABLE_JIT'] = '1'\n{code}"
    assert python(disabled) == python(code)


def test_nothing_is_left_to_compile_after_warm_up() -> None:
    code = """
import numpy as np
from eplb_platform.algorithms import load_algorithm, rebalance_experts
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology
load_algorithm("deepseek")().warm_up()
from eplb_platform.algorithms import deepseek_kernels, slot_kernels
def compiled():
    kernels = [*vars(deepseek_kernels).values(), *vars(slot_kernels).values()]
    return sum(len(kernel.signatures) for kernel in kernels if hasattr(kernel, "signatures"))
before = compiled()
topology = Topology(4, 2)
layouts = np.ones((3, 8), dtype=np.int32), np.ones((8, 3), dtype=np.float32).T, np.ones((2, 3, 8))
for load in layouts:
    for current in (None, ExpertMap.initial(3, 8, topology, 4)):
        for groups in (1, 2):
            rebalance_experts(
                load * np.arange(8),
                num_physical_experts=12,
                topology=topology,
                num_expert_groups=groups,
                current=current,
            )
print(before > 0, compiled() - before)
"""
    assert python(code).split() == ["True", "0"]


class Absurd(Algorithm):
    name = "absurd"

    def __init__(self, *, columns: int = 12) -> None:
        self.columns = columns

    def place(self, load: np.ndarray, **_: object) -> np.ndarray:
        return np.zeros((load.shape[1], self.columns), dtype=np.int32)


def test_an_algorithm_that_breaks_its_contract_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_platform.algorithms.discovery.load_algorithm", lambda _: Absurd)
    for options, match in (
        ({}, "layer 0: experts 1, 2"),
        ({"columns": 11}, "shape .2, 11., expected .2, 12."),
    ):
        with pytest.raises(AlgorithmError, match=f"'absurd' made .*{match}"):
            rebalance_experts(LOAD, num_physical_experts=12, topology=TOPOLOGY, algorithm="absurd", **options)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_placement_is_valid_seeded_and_without_doubles(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 6))
    active = data.draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
    num_experts = data.draw(st.integers(1, 12))
    slots = data.draw(st.integers(-(-num_experts // len(active)), num_experts))
    arguments: dict[str, Any] = {
        "num_physical_experts": slots * num_ranks,
        "topology": Topology(num_ranks, active_ranks=tuple(active)),
        "algorithm": "random",
        "seed": data.draw(st.integers(0, 3)),
    }
    load = np.zeros((data.draw(st.integers(1, 3)), num_experts))
    plan = rebalance_experts(load, **arguments)
    assert plan.expert_map.same_rank_replicas.sum() == 0
    assert rebalance_experts(load, **arguments).expert_map == plan.expert_map


def test_random_placements_of_layers_and_seeds_differ() -> None:
    maps = [
        rebalance_experts(
            np.ones((2, 32)), num_physical_experts=40, topology=TOPOLOGY, algorithm="random", seed=seed
        ).expert_map.physical_to_logical
        for seed in (0, 1)
    ]
    assert (maps[0] != maps[1]).any()
    assert (maps[0][0] != maps[0][1]).any()


def test_keep_slots_known_answer() -> None:
    current = ExpertMap([[0, 1, 2, 3, 4, 0], [1, 1, 2, 0, 3, 4]], 5, Topology(2))
    placed = np.array([[2, 4, 0, 1, 0, 3], [2, 1, 1, 4, 2, 3]], dtype=np.int32)
    kept = keep_slots(placed, current)
    assert kept.tolist() == [[0, 4, 2, 3, 1, 0], [1, 1, 2, 2, 3, 4]]
