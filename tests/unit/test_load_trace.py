from __future__ import annotations

import json
import resource
import struct
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from eplb_platform.records import RecordError, load_trace
from eplb_platform.records.load_trace import LoadTrace, LoadTraceWriter

SHARED_TRACES = Path(__file__).parents[3] / "shared" / "traces"
ROWS = np.random.default_rng(0).integers(0, 1000, (9, 3, 5))
PHASES = [0, 1, 2, 1, 1, 0, 2, 1, 0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.safetensors"


def write_rows(path: Path, **options: Any) -> LoadTraceWriter:
    writer = LoadTraceWriter(path, num_layers=3, num_logical_experts=5, **options)
    for row, phase in zip(ROWS, PHASES, strict=True):
        writer.append(row, phase)
    return writer


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_what_is_appended_is_read_back(path: Path, dtype: type) -> None:
    write_rows(path, metadata={"model": "Qwen3-MoE é"}, dtype=dtype).close()
    trace = load_trace.read(path)
    assert trace.expert_load.dtype == dtype
    assert (trace.expert_load == ROWS).all()
    assert trace.phase.tolist() == PHASES
    assert trace.metadata == {"model": "Qwen3-MoE é", "format_version": "1"}
    assert (trace.num_steps, trace.num_layers, trace.num_logical_experts) == ROWS.shape


def test_the_library_reads_what_is_written_and_the_other_way_round(path: Path) -> None:
    write_rows(path).close()
    tensors = load_file(path)
    assert (tensors["expert_load"] == ROWS).all()
    assert tensors["phase"].tolist() == PHASES
    other = path.with_name("library.safetensors")
    save_file({"phase": np.array(PHASES, np.uint8), "expert_load": ROWS, "more": np.ones(3)}, other)
    trace = load_trace.read(other)
    assert (trace.expert_load == ROWS).all()
    assert trace.phase.tolist() == PHASES
    assert trace.metadata == {}


def test_a_trace_is_written_whole(path: Path) -> None:
    trace = LoadTrace(ROWS, np.array(PHASES, np.uint8), {"model": "m"})
    load_trace.write(path, trace)
    again = load_trace.read(path)
    assert (again.expert_load == ROWS).all()
    assert again.metadata == {"model": "m", "format_version": "1"}
    load_trace.write(path, again)  # over the file that it is mapped from
    assert (load_trace.read(path).expert_load == ROWS).all()
    assert (again.expert_load == ROWS).all()


def test_a_bad_trace_is_not_written(path: Path) -> None:
    with pytest.raises(RecordError, match=r"expert_load\[0\]\[0\]\[0\]: -"):
        load_trace.write(path, LoadTrace(-1 - ROWS, np.array(PHASES, np.uint8)))
    with pytest.raises(RecordError, match="phase: 2 steps, expected 9"):
        load_trace.write(path, LoadTrace(ROWS, np.zeros(2, np.uint8)))
    with pytest.raises(ValueError, match="dtype is int16, expected int32 or int64"):
        load_trace.write(path, LoadTrace(ROWS.astype(np.int16), np.array(PHASES, np.uint8)))  # type: ignore[arg-type]
    assert list(path.parent.iterdir()) == []


def test_a_trace_is_mapped_and_read_only(path: Path) -> None:
    write_rows(path).close()
    trace = load_trace.read(path)
    assert isinstance(trace.expert_load, np.memmap)
    assert trace.expert_load.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        trace.expert_load[0] = 1


def test_a_trace_of_no_steps_is_a_trace(path: Path) -> None:
    LoadTraceWriter(path, num_layers=2, num_logical_experts=4).close()
    assert load_trace.read(path).expert_load.shape == (0, 2, 4)
    assert load_file(path)["expert_load"].shape == (0, 2, 4)


def test_checkpoints_make_a_valid_trace_at_each_doubling(path: Path) -> None:
    writer = LoadTraceWriter(path, num_layers=3, num_logical_experts=5)
    assert not writer.checkpoint()
    made = []
    for step, (row, phase) in enumerate(zip(ROWS, PHASES, strict=True), start=1):
        writer.append(row, phase)
        if writer.checkpoint():
            made.append(step)
            assert (load_trace.read(path).expert_load == ROWS[:step]).all()
    assert made == [1, 2, 4, 8]
    writer.close()
    writer.close()
    assert (load_trace.read(path).expert_load == ROWS).all()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_appending_and_checkpoints_go_side_by_side(path: Path) -> None:
    writer = LoadTraceWriter(path, num_layers=1, num_logical_experts=64)
    finished = threading.Event()
    seen: list[int] = []

    def checkpoint_until_finished() -> None:
        while not finished.is_set():
            if writer.checkpoint():
                steps = load_trace.read(path).expert_load[:, 0, 0]
                assert (steps == np.arange(steps.size)).all()
                seen.append(steps.size)

    background = threading.Thread(target=checkpoint_until_finished)
    background.start()
    for step in range(2000):
        writer.append(np.full((1, 64), step), 1)
    finished.set()
    background.join()
    writer.close()
    assert seen == sorted(seen)
    assert (load_trace.read(path).expert_load == np.arange(2000)[:, None, None]).all()


def test_the_trace_is_not_kept_in_memory(path: Path) -> None:
    row = np.ones((16, 1024), np.int32)
    with LoadTraceWriter(path, num_layers=16, num_logical_experts=1024) as writer:
        tracemalloc.start()
        for _ in range(600):  # 39 MB
            writer.append(row, 0)
        writer.checkpoint()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10_000_000


def test_a_step_that_does_not_fit_on_the_disk_is_left_out(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with LoadTraceWriter(path, num_layers=3, num_logical_experts=5) as writer:
        writer.append(ROWS[0], 0)
        size = path.with_name(f"{path.name}.partial").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # the row is cut short
        try:
            with pytest.raises(RecordError, match=r"trace\.safetensors\.partial: File too large"):
                writer.append(ROWS[1], 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert load_trace.read(f"{path}.partial").num_steps == 1
        writer.append(ROWS[2], 2)
    assert (load_trace.read(path).expert_load == ROWS[[0, 2]]).all()
    assert load_trace.read(path).phase.tolist() == [0, 2]


def test_two_writers_of_one_trace_are_refused(path: Path) -> None:
    with (
        LoadTraceWriter(path, num_layers=3, num_logical_experts=5) as writer,
        pytest.raises(RecordError, match=r"trace\.safetensors\.partial: another writer is at work on it"),
    ):
        writer.append(ROWS[0], 0)
        LoadTraceWriter(path, num_layers=3, num_logical_experts=5)
    assert load_trace.read(path).num_steps == 1


@pytest.mark.parametrize(
    ("row", "phase", "message"),
    [
        (ROWS[0, :2], 0, r"expert load is int64 \[2, 5\], expected integers \[3, 5\]"),
        (ROWS[0] * 1.0, 0, r"expert load is float64 \[3, 5\], expected integers"),
        (-1 - ROWS[0], 0, "layer 0: expert 0 has -851 tokens, expected 0 to 2147483647"),
        (np.full((3, 5), 2**31), 0, f"layer 0: expert 0 has {2**31} tokens, expected 0 to 2147483647"),
        (ROWS[0], 3, "phase is 3, expected 0 to 2"),
    ],
)
def test_a_step_that_is_no_load_is_refused_and_left_out(
    path: Path, row: Any, phase: int, message: str
) -> None:
    with LoadTraceWriter(path, num_layers=3, num_logical_experts=5) as writer:
        writer.append(ROWS[0], 0)
        with pytest.raises(ValueError, match=message):
            writer.append(row, phase)
        writer.append(ROWS[1], 1)
    assert (load_trace.read(path).expert_load == ROWS[:2]).all()


def test_counts_above_int32_fit_into_int64(path: Path) -> None:
    with LoadTraceWriter(path, num_layers=1, num_logical_experts=1, dtype=np.int64) as writer:
        writer.append([[10**12]], 0)
    assert load_trace.read(path).expert_load.tolist() == [[[10**12]]]


def test_writers_of_nothing_are_refused(path: Path) -> None:
    for options, message in (
        ({"num_layers": 0, "num_logical_experts": 5}, r"\[layers, logical\] is \[0, 5\]"),
        ({"num_layers": 2**13, "num_logical_experts": 2**12}, r"and 16777216 counts at most"),
        (
            {"num_layers": 1, "num_logical_experts": 5, "dtype": np.float32},
            "dtype is float32, expected int32",
        ),
        (
            {"num_layers": 1, "num_logical_experts": 5, "metadata": {"a": 1}},
            "metadata 'a' is 1, expected text",
        ),
        ({"num_layers": 1, "num_logical_experts": 5, "metadata": {"a": "x" * 2**20}}, "header has"),
    ):
        with pytest.raises(ValueError, match=message):
            LoadTraceWriter(path, **options)
    with pytest.raises(RecordError, match=r"Not a directory|File exists"):
        (path.parent / "file").touch()
        LoadTraceWriter(path.parent / "file" / "trace.safetensors", num_layers=1, num_logical_experts=1)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_closed_writer_takes_nothing(path: Path) -> None:
    writer = write_rows(path)
    writer.close()
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.append(ROWS[0], 0)
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.checkpoint()


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors(**changes: Any) -> dict[str, Any]:
    """The header of a trace of one step, one layer and two experts."""
    header = {
        "expert_load": {"dtype": "I64", "shape": [1, 1, 2], "data_offsets": [0, 16]},
        "phase": {"dtype": "U8", "shape": [1], "data_offsets": [16, 17]},
    }
    return {**header, **changes}


GOOD_DATA = struct.pack("<qqB", 3, 4, 1)


def test_the_smallest_trace_is_read(path: Path) -> None:
    path.write_bytes(raw(tensors(), GOOD_DATA))
    trace = load_trace.read(path)
    assert trace.expert_load.tolist() == [[[3, 4]]]
    assert trace.phase.tolist() == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected a .safetensors file"),
        (b"\xff" * 20, "a header of 18446744073709551615 bytes, expected a .safetensors file"),
        (raw(b"{"), "no valid JSON"),
        (raw(b"[" * 100_000), "nested too deeply"),
        (raw([]), "header: expected one object"),
        (raw(b'{"phase": 1, "phase": 2}'), "header: expected one object"),
        (raw({}), "expert_load: missing, expected a tensor"),
        (raw(tensors(phase=3), GOOD_DATA), "phase: missing, expected a tensor"),
        (
            raw(tensors(expert_load={"dtype": "F32", "shape": [1, 1, 2], "data_offsets": [0, 8]}), GOOD_DATA),
            "expert_load.dtype: 'F32', expected I32 or I64",
        ),
        (
            raw(tensors(expert_load={"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]}), GOOD_DATA),
            "expert_load.shape: [1, 2], expected [steps, layers, logical]",
        ),
        (
            raw(tensors(expert_load={"dtype": "I64", "shape": [0, 2**70, 1], "data_offsets": [0, 0]})),
            "expert_load.shape: [0, ",
        ),
        (
            raw(tensors(expert_load={"dtype": "I64", "shape": [0, 2**20, 2**20], "data_offsets": [0, 0]})),
            "expert_load.shape: [0, 1048576, 1048576]",
        ),
        (
            raw(
                tensors(expert_load={"dtype": "I64", "shape": [1, 1, -2], "data_offsets": [0, 16]}), GOOD_DATA
            ),
            "expert_load.shape: [1, 1, -2]",
        ),
        (
            raw(tensors(expert_load={"dtype": "I64", "shape": [1, 1, 2], "data_offsets": [0, 8]}), GOOD_DATA),
            "expert_load.data_offsets: [0, 8], expected 16 bytes",
        ),
        (raw(tensors(), GOOD_DATA[:-1]), "phase: ends at byte "),
        (
            raw(tensors(phase={"dtype": "U8", "shape": [2], "data_offsets": [15, 17]}), GOOD_DATA),
            "phase: 2 steps, expected 1",
        ),
        (raw(tensors(), struct.pack("<qqB", 3, -4, 1)), "expert_load[0][0][1]: -4, expected at least 0"),
        (raw(tensors(), struct.pack("<qqB", 3, 4, 3)), "phase[0]: 3, expected 0 to 2"),
        (raw(tensors(__metadata__={"a": 1}), GOOD_DATA), "__metadata__: {'a': 1}, expected text by text"),
        (
            raw(tensors(__metadata__={"format_version": "2"}), GOOD_DATA),
            "__metadata__.format_version: '2', expected '1'",
        ),
    ],
)
def test_what_is_no_trace_is_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        load_trace.read(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none\.safetensors: No such file or directory"):
        load_trace.read(tmp_path / "none.safetensors")
    with pytest.raises(RecordError, match="a folder, expected a file"):
        load_trace.read(tmp_path)


def test_a_negative_count_in_a_later_piece_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = np.zeros((50, 1, 2), np.int64)
    load[37, 0, 1] = -1
    save_file({"expert_load": load, "phase": np.zeros(50, np.uint8)}, path)
    monkeypatch.setattr(load_trace, "_CHUNK_BYTES", 100)
    with pytest.raises(RecordError, match=r"expert_load\[37\]\[0\]\[1\]: -1"):
        load_trace.read(path)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_whatever_is_in_a_file_is_a_trace_or_a_record_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, replaced: bytes
) -> None:
    content = raw(tensors(__metadata__={"format_version": "1"}), GOOD_DATA)
    path = tmp_path_factory.mktemp("traces") / "trace.safetensors"
    path.write_bytes(content[:position] + replaced + content[position + len(replaced) :])
    try:
        trace = load_trace.read(path)
    except RecordError:
        return
    assert trace.expert_load.shape[0] == trace.phase.size


@pytest.mark.skipif(not SHARED_TRACES.is_dir(), reason="the published traces are not beside the repository")
def test_published_traces_are_read() -> None:
    for file in SHARED_TRACES.glob("*.safetensors"):
        trace = load_trace.read(file)
        assert (trace.num_layers, trace.num_logical_experts) == (58, 256)
        assert trace.metadata["num_experts_per_token"] == "8"


def test_pages_of_a_mapped_load_are_given_back(tmp_path: Path) -> None:
    load = np.random.default_rng(0).integers(0, 9, (256, 64, 64)).astype(np.int32)
    load_trace.write(tmp_path / "t.safetensors", LoadTrace(load, np.zeros(256, dtype=np.uint8)))
    trace = load_trace.read(tmp_path / "t.safetensors")

    total = trace.expert_load.sum()
    before = _resident(Path("/proc/self/smaps").read_text())
    load_trace.release_pages(trace.expert_load)
    assert before >= load.nbytes // 1024 and _resident(Path("/proc/self/smaps").read_text()) < before // 4
    assert trace.expert_load.sum() == total


def _resident(smaps: str) -> int:
    """Kilobytes in memory of the mappings of the trace."""
    resident, mine = 0, False
    for line in smaps.splitlines():
        if "-" in line.split(" ")[0]:
            mine = line.endswith("t.safetensors")
        elif mine and line.startswith("Rss:"):
            resident += int(line.split()[1])
    return resident
