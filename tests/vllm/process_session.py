"""Processes of an engine under test: found by their session, and ended with all that they started."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def free_port() -> int:
    """A port that the kernel gives nobody by itself: it stays free until the process that starts binds it,
    many seconds later, whatever else runs on the machine.
    """
    while True:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port := random.randrange(15_000, 32_000)))
            return port


class ProcessSession:
    """A process that leads a session of its own, so that all it starts can be found, its orphans too."""

    def __init__(
        self, command: list[str], log: Path, environment: Mapping[str, str], **options: object
    ) -> None:
        self.log = log
        self._shared_memory: set[Path] = set()
        with log.open("wb") as output:
            self.popen: subprocess.Popen[str] = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, **ENVIRONMENT, **environment},
                start_new_session=True,
                text=True,
                **options,  # type: ignore[call-overload]
            )

    def members(self) -> dict[int, str]:
        """Process ids of the session's processes, zombies aside, with their command lines.

        What shared memory they have is noted in passing: a killed process takes away none of its own.
        """
        found = {}
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and self._is_member(folder):
                    title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(folder.name)] = title.strip()
                    self._shared_memory |= shared_memory_of(folder)
        return found

    def _is_member(self, folder: Path) -> bool:
        # pid (name) state parent group session ...; the name may hold spaces and brackets
        state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        return int(session) == self.popen.pid and state != "Z"

    def workers(self) -> list[int]:
        """Process ids of vLLM's workers (its process title), in the order of their start."""
        return sorted(pid for pid, title in self.members().items() if "VLLM::Worker" in title)

    def wait_until_gone(self, timeout_s: float) -> dict[int, str]:
        """Who is still there at the end of the time; nobody is what is wanted."""
        deadline = time.monotonic() + timeout_s
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def kill(self) -> None:
        """End all of the session's processes, and take away the shared memory that killed workers leave."""
        deadline = time.monotonic() + 120.0
        while (left := self.members()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(0.1)
        self.popen.wait(60.0)
        for path in self._shared_memory:
            path.unlink(missing_ok=True)

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def shared_memory_of(process: Path) -> set[Path]:
    """The files of shared memory that a process has mapped. process: its folder in /proc."""
    lines = (process / "maps").read_text(errors="replace").splitlines()
    names = {line.partition(str(SHARED_MEMORY) + "/")[2].partition(" ")[0] for line in lines}
    return {SHARED_MEMORY / name for name in names if name}
