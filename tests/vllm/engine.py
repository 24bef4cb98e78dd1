"""An offline vLLM engine in a process of its own, as the tests drive it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.vllm.process_session import ProcessSession, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 600.0
CALL_S = 600.0
COMMON = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
    "worker_extension_cls": "tests.vllm.worker_extension.Probe",
}


class EngineFailed(RuntimeError):
    """The engine refused an order, or its process ended."""


@dataclass(frozen=True)
class Generated:
    tokens: list[list[int]]
    seconds: float


class Engine:
    """`LLM(model, **options)` in a process; use it as a context manager."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        eplb: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        **options: object,
    ) -> None:
        arguments: dict[str, object] = {**COMMON, "model": str(model), **options}
        if eplb is not None:
            arguments["additional_config"] = {"eplb_config": dict(eplb)}
            arguments.setdefault("enable_expert_parallel", True)
        self._read_end, write_end = os.pipe()
        script = str(Path(__file__).with_name("engine_process.py"))
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.process = ProcessSession(
            [sys.executable, script, str(write_end)],
            log,
            {"PYTHONPATH": paths, "VLLM_PORT": str(free_port()), **(environment or {})},
            stdin=subprocess.PIPE,
            pass_fds=[write_end],
            cwd=log.parent,
        )
        os.close(write_end)
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._send(arguments)
        self._started = False

    def __enter__(self) -> Engine:
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Raises EngineFailed with what the engine said when it does not start."""
        if not self._started:
            self._result(START_S)
            self._started = True

    # --- orders ---

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, timeout_s: float = CALL_S
    ) -> Generated:
        """Greedy tokens of each prompt."""
        self.send_generate(prompts, max_tokens)
        return self.receive_generated(timeout_s)

    def send_generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self._send({"call": "generate", "prompts": [list(p) for p in prompts], "max_tokens": max_tokens})

    def receive_generated(self, timeout_s: float = CALL_S) -> Generated:
        return Generated(**self._result(timeout_s))

    def rpc(self, method: str, *arguments: object, timeout_s: float = CALL_S) -> list[Any]:
        """What each worker answers."""
        self._send({"call": "rpc", "method": method, "args": arguments, "timeout_s": timeout_s})
        result: list[Any] = self._result(timeout_s + 10.0)
        return result

    def call(self, method: str, *arguments: object, timeout_s: float = CALL_S) -> Any:
        """A method of `LLM` by its name."""
        self._send({"call": method, "args": arguments})
        return self._result(timeout_s)

    def close(self) -> None:
        """End it now; vLLM takes eight seconds to leave by itself."""
        self.process.kill()

    def leave(self, timeout_s: float = 120.0) -> dict[int, str]:
        """Let it leave by itself; return who is still there afterwards."""
        if self.process.popen.stdin is not None:
            self.process.popen.stdin.close()
        self.process.popen.wait(timeout_s)
        return self.process.wait_until_gone(60.0)

    # --- the pipe ---

    def _send(self, order: Mapping[str, object]) -> None:
        stdin = self.process.popen.stdin
        if stdin is None:
            raise EngineFailed("the engine takes no orders")
        try:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
        except OSError as error:
            raise EngineFailed(f"the engine is gone: {error}\n{self.process.log_tail()}") from error

    def _read(self) -> None:
        with os.fdopen(self._read_end) as answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put(None)

    def _result(self, timeout_s: float) -> Any:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineFailed(f"no answer in {timeout_s:.0f} s\n{self.process.log_tail()}") from None
        if line is None:
            raise EngineFailed(f"the engine's process ended\n{self.process.log_tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{answer['error']}\n{self.process.log_tail()}")
        return answer["result"]
