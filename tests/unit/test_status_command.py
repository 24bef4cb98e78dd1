"""`eplb status`: in words and as JSON, from an address and from files, and what is refused."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from eplb_platform.cli import engine_status, run
from eplb_platform.snapshot_files import Snapshot
from eplb_platform.telemetry import SnapshotCollector
from tests.unit.test_telemetry import NOW, snapshot


def metrics(*snapshots: dict[str, object]) -> bytes:
    registry = CollectorRegistry()
    workers = [Snapshot.model_validate(given) for given in snapshots]
    registry.register(SnapshotCollector(lambda: workers, now=lambda: NOW))
    return b'# HELP vllm:other nothing\nvllm:other{a="}"} 1\n' + generate_latest(registry)


@contextmanager
def serving(content: bytes, code: int = 200, location: str = "") -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            with suppress(OSError):  # the reader has had enough
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def test_it_says_what_an_idle_balancer_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(metrics(snapshot(0), snapshot(1))) as address:
        assert run(["status", address]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "moe: idle (2 ranks)",
        "  last success: 25 s ago; last cycle ended 20 s ago",
        "  cycles: 1 moved, 0 stayed, 0 no load, 0 cancelled, 1 failed; experts moved: 7",
        "  balancedness: 0.800, worst layer 0.500",
        "  waits for: 400 more forward passes until the next cycle",
    ]


def test_it_names_the_missing_rank_and_the_silent_one(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = {"state": "start", "stage_running_s": 31.0, "waits_at": "cycle/7/start", "waits_for": [2]}
    silent = snapshot(2, updated=NOW - 50)
    with serving(metrics(snapshot(0, **waiting), snapshot(1, **waiting), silent)) as address:
        assert run(["status", address]) == 0
        said = capsys.readouterr().out
        assert run(["status", address, "--json"]) == 0
    assert "moe: starting a cycle for 31 s (3 ranks)" in said
    assert "waits for: rank 2 (missed by rank 0, 1)" in said
    assert "not heard of, or stuck in a step: rank 2" in said
    (model,) = json.loads(capsys.readouterr().out)
    assert (model["state"], model["waits_for_ranks"], model["silent_ranks"]) == ("start", [2], [2])


def test_state_files_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(snapshot(rank)))
    assert run(["status", str(tmp_path)]) == 0
    assert "moe: idle (2 ranks)" in capsys.readouterr().out
    assert run(["status", str(tmp_path / "rank-0.json")]) == 0
    assert "moe: idle (1 rank)" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], target: str) -> str:
    assert run(["status", target]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and "Traceback" not in shown.err
    return shown.err


def test_what_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    garbage = tmp_path / "garbage.json"
    garbage.write_bytes(b"\x00\xff{" * 100)
    assert "no state file of a balancer" in refused(capsys, str(garbage))
    assert "no such file or folder" in refused(capsys, str(tmp_path / "missing"))
    assert "no metrics of a balancer" in refused(capsys, str(tmp_path))
    assert "refused" in refused(capsys, "http://127.0.0.1:1/metrics")
    with serving(b'eplb_state{model="a\n\xff\x00 {{{ eplb_alive{rank="x"} 1e999\n' * 50) as address:
        assert "no metrics of a balancer" in refused(capsys, address)
    with serving(b"no", code=500) as address:
        assert "500" in refused(capsys, address)


def test_an_endpoint_that_lies_harms_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    """Labels without an end, metrics without their labels, and names that would control a terminal."""
    endless = b"eplb_state{" + b"a" * (1 << 22) + b"} 1\n"
    bare = b"".join(
        b'eplb_%s{model="a{b}\x1b]0;x\x07"} 1\n' % name
        for name in (b"state", b"alive", b"waiting_for_rank", b"cycles_total", b"stage_running_seconds")
    )
    with serving(endless + bare) as address:
        assert run(["status", address]) == 0
        said = capsys.readouterr().out
        assert run(["status", address, "--json"]) == 0
    assert said.startswith("a{b} ]0;x : unknown (0 ranks)\n")
    assert all(line.isprintable() for line in said.splitlines())


def test_it_is_sent_to_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics").write_bytes(metrics(snapshot(0)))
    with serving(b"", code=302, location=f"file://{tmp_path}/metrics") as address:
        assert "is not allowed" in refused(capsys, address)


def test_an_answer_that_drips_is_given_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_status, "TIMEOUT_S", 2.0)

    def drip() -> None:
        call, _ = listener.accept()
        with call, suppress(OSError):
            for letter in b"HTTP/1.1 200 " + b"K" * 200:  # the line never ends in time
                call.sendall(bytes([letter]))
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, daemon=True).start()
        assert "not read within" in refused(capsys, f"http://127.0.0.1:{listener.getsockname()[1]}/metrics")


def test_it_reads_no_more_than_a_bound_and_no_longer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_status, "MAX_BYTES", 1 << 20)
    with serving(b"eplb_steps_total 1\n" * (1 << 17)) as address:
        assert "more than 1048576 bytes" in refused(capsys, address)
    monkeypatch.setattr(engine_status, "TIMEOUT_S", 0.3)
    silent = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # takes the call and never answers
    assert "timed out" in refused(capsys, f"http://127.0.0.1:{silent.server_port}/metrics")
    silent.server_close()
