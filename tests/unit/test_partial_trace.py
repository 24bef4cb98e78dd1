"""What a writer of a trace leaves that was killed: reading it, keeping it, and being told of it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_platform.cli import run
from eplb_platform.records import RecordError, formats, load_trace, partial_trace
from eplb_platform.records.load_trace import LoadTraceWriter
from eplb_platform.runtime.recording import TraceRecorder

ROWS = np.random.default_rng(0).integers(0, 1000, (9, 3, 5))
PHASES = [0, 1, 2, 1, 1, 0, 2, 1, 0]
ROW_BYTES = 3 * 5 * 4 + 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.safetensors"


def partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def killed(path: Path, writing: Callable[[LoadTraceWriter], None], **options: Any) -> Path:
    """What a process leaves that is killed after `writing`."""
    child = os.fork()
    if child == 0:
        try:
            writing(LoadTraceWriter(path, num_layers=3, num_logical_experts=5, **options))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return partial_of(path)


def append_all(writer: LoadTraceWriter) -> None:
    for row, phase in zip(ROWS, PHASES, strict=True):
        writer.append(row, phase)


def checkpoint_early(writer: LoadTraceWriter) -> None:
    writer.append(ROWS[0], PHASES[0])
    writer.checkpoint()
    for row, phase in zip(ROWS[1:], PHASES[1:], strict=True):
        writer.append(row, phase)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_what_a_killed_writer_left_is_a_trace(path: Path, dtype: type) -> None:
    partial = killed(path, append_all, metadata={"model": "Qwen3-MoE é"}, dtype=dtype)
    trace = load_trace.read(partial)
    assert isinstance(trace.expert_load, np.memmap)
    assert trace.expert_load.flags.aligned and not trace.expert_load.flags.writeable
    assert trace.expert_load.dtype == dtype
    assert (trace.expert_load == ROWS).all()
    assert trace.phase.tolist() == PHASES
    assert trace.metadata == {"model": "Qwen3-MoE é", "format_version": "1"}
    load_trace.write(path, trace)
    assert (load_trace.read(path).expert_load == ROWS).all()
    assert load_trace.read(path).metadata == trace.metadata


def test_a_writer_that_is_killed_at_any_moment_leaves_its_first_steps(path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            writer = LoadTraceWriter(path, num_layers=16, num_logical_experts=1024)
            for step in range(500):
                writer.append(np.full((16, 1024), step), step % 3)
            signal.pause()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 120
    partial = partial_of(path)
    while not partial.exists() or partial.stat().st_size < 50 * 65536:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    trace = load_trace.read(partial)
    state = partial_trace.state(partial)
    assert state == partial_trace.State(trace.num_steps, trace.num_steps, at_work=False)
    assert trace.num_steps >= 49
    assert (trace.expert_load == np.arange(trace.num_steps)[:, None, None]).all()
    assert (trace.phase == np.arange(trace.num_steps) % 3).all()


def test_a_last_row_that_is_cut_at_any_byte_is_left_out(path: Path) -> None:
    content = killed(path, append_all).read_bytes()
    for missing in range(1, ROW_BYTES + 1):
        path.write_bytes(content[:-missing])
        assert (load_trace.read(path).expert_load == ROWS[:8]).all()
        path.write_bytes(content[:-missing] + bytes(missing))  # room that was made for it, and never filled
        assert (load_trace.read(path).expert_load == ROWS[:8]).all()
    path.write_bytes(content[: -2 * ROW_BYTES] + bytes(2 * ROW_BYTES))
    assert (load_trace.read(path).expert_load == ROWS[:7]).all()


def test_a_row_of_zeros_is_told_from_one_that_was_never_written(path: Path) -> None:
    partial = killed(path, lambda writer: writer.append(np.zeros((3, 5), int), 0))
    with partial.open("ab") as file:
        file.truncate(partial.stat().st_size + 5 * ROW_BYTES)
    assert load_trace.read(partial).expert_load.tolist() == np.zeros((1, 3, 5)).tolist()


def test_a_header_that_is_cut_at_any_byte_is_refused(path: Path) -> None:
    content = killed(path, lambda writer: None).read_bytes()
    path.write_bytes(content)
    assert load_trace.read(path).expert_load.shape == (0, 3, 5)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(RecordError, match=r"header: cut short|bytes, expected a \.safetensors file"):
            load_trace.read(path)


def raw(**changes: Any) -> bytes:
    header = {"format_version": "1", "dtype": "I32", "shape": [1, 2], "metadata": {}, **changes}
    text = json.dumps(header).encode()
    return partial_trace.MAGIC + struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw(format_version="2"), "header.format_version: '2', expected '1'"),
        (raw(dtype="F32"), "header.dtype: 'F32', expected I32 or I64"),
        (raw(dtype=[]), "header.dtype: [], expected I32 or I64"),
        (raw(shape=[1]), "header.shape: [1], expected [layers, logical]"),
        (raw(shape=[1, 2**70]), "header.shape: [1, "),
        (raw(shape=[2**20, 2**20]), "header.shape: [1048576, 1048576]"),
        (raw(shape=[True, 2]), "header.shape: [True, 2]"),
        (raw(metadata={"a": 1}), "header.metadata: {'a': 1}, expected text by text"),
        (partial_trace.MAGIC + b"\xff" * 8, "header: 18446744073709551615 bytes, expected at most"),
        (partial_trace.MAGIC + struct.pack("<Q", 2) + b"[]", "header: expected one object"),
        (partial_trace.MAGIC + struct.pack("<Q", 2) + b"{]", "no valid JSON"),
    ],
)
def test_what_is_no_partial_trace_is_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    for read in (load_trace.read, formats.read_trace):
        with pytest.raises(RecordError) as caught:
            read(path)
        assert message in str(caught.value)


def test_rows_larger_than_any_memory_are_no_rows(path: Path) -> None:
    with path.open("wb") as file:
        file.write(raw(shape=[2**20, 16], dtype="I64"))
        file.truncate(1 << 36)
    assert load_trace.read(path).expert_load.shape == (0, 2**20, 16)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_whatever_is_changed_no_step_is_wrong(
    tmp_path_factory: pytest.TempPathFactory, position: int, replaced: bytes
) -> None:
    form = partial_trace.RowForm("I32", (3, 5), {"model": "m"})
    rows = [form.row(row.astype("<i4"), phase) for row, phase in zip(ROWS, PHASES, strict=True)]
    content = b"".join([form.header(), *rows])
    changed = content[:position] + replaced + content[position + len(replaced) :]
    path = tmp_path_factory.mktemp("traces") / "trace.safetensors.partial"
    path.write_bytes(changed)
    try:
        trace = load_trace.read(path)
    except RecordError:
        return
    if trace.num_steps:
        assert (trace.expert_load == ROWS[: trace.num_steps]).all()
        assert trace.phase.tolist() == PHASES[: trace.num_steps]
    assert partial_trace.state(path) is not None


def test_what_is_being_written_is_read_as_it_is(path: Path) -> None:
    with LoadTraceWriter(path, num_layers=3, num_logical_experts=5) as writer:
        writer.append(ROWS[0], 0)
        trace = load_trace.read(partial_of(path))
        assert partial_trace.state(partial_of(path)) == partial_trace.State(1, 1, at_work=True)
        writer.append(ROWS[1], 1)
    assert (trace.expert_load == ROWS[:1]).all()  # and stays, though the file is gone
    assert not partial_of(path).exists()


def test_of_killed_runs_the_longest_is_kept(path: Path) -> None:
    kept = path.with_name(f"{path.name}.partial.1")
    for steps, most in ((1, 1), (2, 2), (0, 2), (1, 2)):
        killed(path, lambda writer, rows=ROWS[:steps]: [writer.append(row, 1) for row in rows])
        with LoadTraceWriter(path, num_layers=3, num_logical_experts=5) as writer:
            writer.append(ROWS[3], 0)
            assert writer.kept == (kept if steps == most else None)
        assert (formats.read_trace(kept).expert_load == ROWS[:most]).all()
    assert load_trace.read(path).num_steps == 1
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, kept.name]


@pytest.mark.parametrize("steps", [1, 3])
def test_what_a_command_has_open_stays_whole_when_a_run_begins(path: Path, steps: int) -> None:
    """Whether it is kept or not: a mapped file that is cut kills who reads it."""
    for rows in (ROWS[:2], ROWS[:steps]):
        killed(path, lambda writer, rows=rows: [writer.append(row, 1) for row in rows])
        trace = load_trace.read(partial_of(path))
        with partial_of(path).open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            with LoadTraceWriter(path, num_layers=1, num_logical_experts=1):
                assert os.fstat(opened.fileno()).st_size == size
                assert (trace.expert_load == rows).all()


def test_a_writer_whose_file_was_moved_away_removes_no_other_writers_file(path: Path) -> None:
    first = LoadTraceWriter(path, num_layers=3, num_logical_experts=5)
    append_all(first)
    partial_of(path).rename(path.with_name("away"))
    second = LoadTraceWriter(path, num_layers=3, num_logical_experts=5)
    second.append(ROWS[0], 0)
    first.close()
    assert (load_trace.read(path).expert_load == ROWS).all()
    assert (load_trace.read(partial_of(path)).expert_load == ROWS[:1]).all()
    second.close()
    assert not partial_of(path).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_serves(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    killed(path, append_all)
    assert partial_trace.state(partial_of(path)) == partial_trace.State(9, 9, at_work=False)
    with LoadTraceWriter(path, num_layers=3, num_logical_experts=5) as writer:
        append_all(writer)
        assert writer.kept == path.with_name(f"{path.name}.partial.1")
    assert (load_trace.read(path).expert_load == ROWS).all()


def test_a_file_that_is_all_holes_is_looked_at_at_once(path: Path) -> None:
    partial = killed(path, append_all)
    os.truncate(partial, 1 << 34)
    state = partial_trace.state(partial)
    assert state is not None
    assert state.num_steps == 9
    assert state.num_rows > 1 << 27


def test_the_log_says_where_what_was_left_is_kept(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed(path, append_all)
    recorder = TraceRecorder(path, 3, 5, {})
    recorder.open()
    recorder.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.text.endswith(f"its steps are kept in {path}.partial.1\n")


def test_the_next_writer_keeps_a_file_of_somebody_else(path: Path) -> None:
    partial_of(path).write_text("of a download")
    LoadTraceWriter(path, num_layers=3, num_logical_experts=5).close()
    assert path.with_name(f"{path.name}.partial.1").read_text() == "of a download"
    killed(path, append_all)
    LoadTraceWriter(path, num_layers=3, num_logical_experts=5).close()
    assert path.with_name(f"{path.name}.partial.1").read_text() == "of a download"
    assert (formats.read_trace(path.with_name(f"{path.name}.partial.2")).expert_load == ROWS).all()


def test_a_trace_that_cannot_be_made_leaves_the_partial_file(path: Path) -> None:
    writer = LoadTraceWriter(path, num_layers=3, num_logical_experts=5)
    append_all(writer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RecordError, match="File too large"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()
    assert (load_trace.read(partial_of(path)).expert_load == ROWS).all()


def test_commands_say_that_more_was_left(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = killed(path, checkpoint_early)
    note = f"eplb: note: {path}: 1 steps, but its writer was killed and left 9 in {partial.name}; "
    report = ["report", str(path), "--ep-size", "1", "--json"]
    assert run(report) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["steps"] == 1
    assert said.err == f"{note}for a trace of all: eplb convert {partial} -o {path}\n"
    path.rename(path.with_name("earlier"))
    assert run(report) == 2
    assert "0 steps, but its writer was killed and left 9" in capsys.readouterr().err

    assert run(["convert", str(partial), "-o", str(path)]) == 0
    assert capsys.readouterr().err == ""
    assert run(report) == 0
    said = capsys.readouterr()
    assert (json.loads(said.out)["steps"], said.err) == (9, "")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("report", ("--ep-size", "1")),
        ("validate", ()),
        ("plan", ("--ep-size", "5", "--num-slots", "10", "-o", "map.json")),
        ("bench", ("--shape", "5x10x5", "--algorithm", "deepseek")),
    ],
)
def test_commands_read_a_partial_trace(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: tuple[str, ...],
) -> None:
    monkeypatch.chdir(path.parent)
    partial = killed(path, append_all)
    assert run([command, str(partial), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_commands_say_what_a_partial_trace_lacks(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LoadTraceWriter(path, num_layers=3, num_logical_experts=5) as writer:
        append_all(writer)
        writer.checkpoint()
        assert run(["validate", str(path)]) == 0  # one at work will make the trace
        assert capsys.readouterr().err == ""
        assert run(["validate", str(partial_of(path))]) == 0
        said = capsys.readouterr()
        assert "recorded load of 9 steps" in said.out
        assert said.err.endswith("its writer is at work: read as it is now, 9 steps\n")

    partial = killed(path.with_name("other"), append_all)
    content = bytearray(partial.read_bytes())
    content[-3 * ROW_BYTES] ^= 1
    partial.write_bytes(content)
    assert run(["validate", str(partial)]) == 0
    said = capsys.readouterr()
    assert "recorded load of 6 steps" in said.out
    assert said.err.endswith("step 6 is damaged: left out with what follows, 3 steps in all\n")
