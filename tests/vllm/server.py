"""`vllm serve` in a process of its own, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.vllm.engine import CALL_S, REPOSITORY
from tests.vllm.process_session import ProcessSession, free_port

READY_S = 900.0
VLLM = str(Path(sys.executable).with_name("vllm"))


class Server:
    """A server that a command starts; use it as a context manager. `{port}` in the command is replaced."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        self.port = free_port()
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.process = ProcessSession(
            [part.replace("{port}", str(self.port)) for part in command],
            log,
            {"PYTHONPATH": paths, **environment},
            cwd=log.parent,
        )

    def __enter__(self) -> Server:
        try:
            self.wait_ready()
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self.process.popen.poll() is None:
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not become ready\n{self.process.log_tail()}")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=CALL_S) as response:
            text: str = response.read().decode()
            return text

    def post(self, path: str, timeout_s: float = CALL_S, **values: object) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(values).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.loads(response.read())

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy tokens of each prompt, all asked for at once."""

        def complete(prompt: Sequence[int]) -> list[int]:
            answer = self.post(
                "/v1/completions",
                model="tiny",
                prompt=list(prompt),
                max_tokens=max_tokens,
                temperature=0.0,
                ignore_eos=True,
                return_token_ids=True,
            )
            tokens: list[int] = answer["choices"][0]["token_ids"]
            return tokens

        with ThreadPoolExecutor(len(prompts)) as requests:
            return list(requests.map(complete, prompts))

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics by name and labels, as they are written."""
        samples = {}
        for line in self.get("/metrics").splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def snapshots(self) -> list[dict[str, Any]]:
        """`eplb_snapshot` of every worker (vLLM's development mode)."""
        found: list[dict[str, Any]] = self.post("/collective_rpc", method="eplb_snapshot")["results"]
        return found
