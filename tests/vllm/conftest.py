"""What the tests with vLLM share: checkpoints, the tokens without balancing, and engines that are ended.

An engine takes half a minute to start: a fixture of module scope holds one, and the tests of the module use
it one after the other, in the order in which they are written.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
Tokens = list[list[int]]

if importlib.util.find_spec("vllm") is None:
    # `make vllm-tests` runs them with the interpreter that has it.
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.compiled_kernels import compile_kernels
    from tests.vllm import checkpoints
    from tests.vllm.engine import Engine
    from tests.vllm.snapshots import layouts, serve_until, statuses
    from tests.vllm.traffic import KINDS, prompts

    PROMPTS = prompts(KINDS, 16)
    TOKENS = 32

    @dataclass(frozen=True)
    class Models:
        """Folders of checkpoints."""

        demo: Path
        qwen3: Path
        deepseek: Path

    @pytest.fixture(scope="session", autouse=True)
    def compiled_kernels() -> None:
        compile_kernels()

    @pytest.fixture(scope="session")
    def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
        folder = tmp_path_factory.mktemp("models")
        script = REPOSITORY / "examples" / "vllm" / "demo_model.py"
        subprocess.run([sys.executable, str(script), str(folder / "demo")], check=True, capture_output=True)
        return Models(
            folder / "demo",
            checkpoints.write_qwen3(folder / "qwen3"),
            checkpoints.write_deepseek(folder / "deepseek"),
        )

    @pytest.fixture(scope="session")
    def unbalanced(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
        """What the demo's model generates for PROMPTS on one rank, with the plugin there but silent."""
        log = tmp_path_factory.mktemp("unbalanced") / "engine.log"
        with Engine(models.demo, log) as engine:
            return engine.generate(PROMPTS, TOKENS).tokens

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """For the logs and records of the module's engine."""
        return tmp_path_factory.mktemp("engine")

    @dataclass(frozen=True)
    class Recording:
        """What an engine did that only records."""

        folder: Path
        tokens: list[list[list[int]]]
        """Of every round of PROMPTS."""
        layouts: tuple[list[list[list[int]]], list[list[list[int]]]]
        """Of every rank, before and after."""
        statuses: list[dict[str, Any]]

        @property
        def first(self) -> Path:
            """The map after one cycle."""
            return self.folder / "first.json"

        @property
        def last(self) -> Path:
            """The map after ten cycles and more."""
            return self.folder / "map.json"

        @property
        def trace(self) -> Path:
            return self.folder / "trace.safetensors"

    @pytest.fixture(scope="session")
    def recording(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Recording:
        """Ten cycles of two ranks that record and move nothing; others serve with the map."""
        folder = tmp_path_factory.mktemp("recording")
        eplb = {
            "num_redundant_experts": 8,
            "expert_map_record_path": str(folder / "map.json"),
            "trace_record_path": str(folder / "trace.safetensors"),
            "expert_heat_collection_interval": 32,
            "algorithm_execution_interval": 0,
        }
        rounds = []
        with Engine(models.demo, folder / "engine.log", tensor_parallel_size=2, eplb=eplb) as engine:
            before = layouts(engine)
            for cycles in (1, 10):
                serve_until(
                    engine,
                    lambda status, cycles=cycles: status["cycles"] >= cycles,
                    lambda: rounds.append(engine.generate(PROMPTS, TOKENS).tokens),
                )
                if cycles == 1:
                    shutil.copyfile(folder / "map.json", folder / "first.json")
            engine.generate(PROMPTS[:1], 2)  # what a step's end leaves to the background
            return Recording(folder, rounds, (before, layouts(engine)), statuses(engine))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines start slowly on a busy machine: the limit is for what hangs."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))
