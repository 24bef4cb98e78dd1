"""The demo as a whole: the command in a process of its own, its ranks, and what becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eplb_platform.demo.settings import CHECKPOINT
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not (CHECKPOINT / "config.json").exists(), reason="the checkpoint is not there"),
]

EPLB = str(Path(sys.executable).parent / "eplb")
PATIENCE_S = 400.0


def test_quick_demo(tmp_path: Path) -> None:
    """All phases with two ranks: same tokens, better balance, a map and a picture."""
    command = [EPLB, "demo", "--quick", "--ranks", "2", "--json", "--picture", "out/p.png"]
    done = subprocess.run(
        [*command, "--expert-map-record-path", "maps/m.json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens_identical"] is True
    phases = result["phases"]
    assert list(phases) == ["contiguous", "dynamic", "record", "static"]
    assert phases["contiguous"]["balancedness"] == phases["record"]["balancedness"]
    assert phases["dynamic"]["balancedness"] > phases["contiguous"]["balancedness"]
    assert phases["dynamic"]["moved_experts"] > 0 and phases["dynamic"]["cycles"] > 0
    assert phases["record"]["moved_experts"] == phases["static"]["moved_experts"] == 0
    assert phases["record"]["cycles"] > 0
    unequal = result["unequal_experts"]
    assert all(0.5 <= phase["time_balancedness"] <= 1 for phase in unequal.values())
    assert unequal["by time"]["failed_cycles"] == 0 and unequal["by time"]["moved_experts"] > 0
    assert (tmp_path / "out" / "p.png").read_bytes().startswith(b"\x89PNG")
    recorded = ExpertMap.load(tmp_path / "maps" / "m.json")
    assert recorded.topology.num_ranks == 2
    assert np.array_equal(recorded.physical_to_logical.shape, (4, 80))
    assert not list((tmp_path / "maps").glob("*.tmp*"))


def test_static_phase_serves_the_map_that_is_given(tmp_path: Path) -> None:
    """A given map may have other redundancy than the other phases; it is served as it is, and judged."""
    ExpertMap.initial(4, 64, Topology(2), 0).save(tmp_path / "worse.json")
    command = [EPLB, "demo", "--quick", "--ranks", "2", "--json", "--expert-map-path", "worse.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert result["tokens_identical"] is True
    assert result["expert_map_path"] == "worse.json"
    better = result["phases"]["static"]["balancedness"] > result["phases"]["contiguous"]["balancedness"]
    assert done.returncode == (0 if better else 1)


def _obey_control_c() -> None:
    """Tests that run in a shell's background have been told to ignore it, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo in the middle of its first phase, which would take far longer than the test."""
    command = [EPLB, "demo", "--ranks", "3", "--steps", "100000"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_obey_control_c,
    ) as demo:
        wait_until(lambda: len(ranks_of(demo.pid)) == 3 and all(map(threads, ranks_of(demo.pid))))
        try:
            yield demo
        finally:
            demo.kill()


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """Direct children of a process that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def ranks_of(demo: int) -> list[int]:
    """The ranks are forked from one child of the demo; its other children have none."""
    return [rank for child in children(demo) for rank in children(child)]


def threads(pid: int) -> bool:
    """Whether a rank is past its start: it then has the threads of its process group."""
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir())) > 2
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() and alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_rank_ends_the_demo_with_one_line(serving: subprocess.Popen[str]) -> None:
    everything = [*children(serving.pid), *ranks_of(serving.pid)]
    os.kill(ranks_of(serving.pid)[1], signal.SIGKILL)
    output, errors = serving.communicate(timeout=PATIENCE_S)
    assert serving.returncode == 1
    assert not output
    line = errors.splitlines()[-1]
    assert line.startswith("eplb: demo: phase contiguous: rank ") and "exit code -9" in line
    assert "Traceback" not in errors
    wait_until(lambda: gone(everything))


def test_control_c_leaves_nothing_running(serving: subprocess.Popen[str]) -> None:
    everything = [*children(serving.pid), *ranks_of(serving.pid)]
    serving.send_signal(signal.SIGINT)
    _, errors = serving.communicate(timeout=PATIENCE_S)
    assert serving.returncode == 130
    assert "Traceback" not in errors
    wait_until(lambda: gone(everything))


def test_ranks_end_when_the_command_is_killed(serving: subprocess.Popen[str]) -> None:
    everything = [*children(serving.pid), *ranks_of(serving.pid)]
    serving.kill()
    wait_until(lambda: gone(everything))
