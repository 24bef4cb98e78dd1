"""Files made to exhaust memory are refused in a process that may take little of it.

One process reads them all, as importing torch takes longer than the reading.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

EXTRA_BYTES = 768 << 20
"""Beyond what the process has taken when all is imported: the largest of the files takes a part of that."""

READER = """
import json, resource, sys, time
import torch
from eplb_platform.expert_map import ExpertMap
from eplb_platform.records import (compute_cost, expert_map_json, load_trace, sglang_location,
    sglang_recorder, tensorrt_llm_yaml, vllm_map)
from eplb_platform.records.fault import RecordError
from eplb_platform.topology import Topology
torch.save({"x": torch.ones(1)}, sys.argv[2]); torch.load(sys.argv[2], weights_only=True, mmap=True)

readers = {
    "map": lambda path: expert_map_json.read(path),
    "yaml": lambda path: tensorrt_llm_yaml.read(path, topology=Topology(2)),
    "trace": load_trace.read,
    "location": lambda path: sglang_location.read(path, topology=Topology(2)),
    "recorder": sglang_recorder.read,
    "vllm": lambda path: vllm_map.read(path, topology=Topology(2)),
    "cost": compute_cost.read,
}
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]),) * 2)
for line in sys.stdin:
    reader, path = json.loads(line)
    started = time.process_time()
    try:
        readers[reader](path)
        said = "was read"
    except RecordError as error:
        said = f"refused: {error}"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([reader, path.rpartition("/")[2], said, time.process_time() - started]), flush=True)
"""


def claiming(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def safetensors(shape: list[int], end: int) -> bytes:
    said = {"expert_load": {"dtype": "I64", "shape": shape, "data_offsets": [0, end]}}
    return claiming(json.dumps(said).encode(), b"\0" * 64)


def npy(shape: tuple[int, ...]) -> bytes:
    header = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64


def zipped(path: Path, pickled: bytes, *, compressed: bool = False) -> None:
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")


def many_references() -> bytes:
    """Lists of lists, each twice: small to hold, endless to print or to walk without care."""
    content: list[object] = []
    for _ in range(60):
        content = [content, content]
    return pickle.dumps({"records": content, "physical_to_logical_map": content}, protocol=2)


def one_layer(**changes: object) -> dict[str, object]:
    devices = [{"device_id": 0, "device_expert": [0, 1]}]
    layer = {"layer_id": 0, "device_count": 1, "device_list": devices, **changes}
    return {"moe_layer_count": 1, "layer_list": [layer]}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """What became of each file, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("hostile")
    huge = 10**15
    files: list[tuple[str, str, bytes]] = [
        ("map", "deep.json", b"[" * 1_000_000 + b"]" * 1_000_000),
        ("map", "lists.json", b"[" + b"[]," * 8_000_000 + b"[]]"),
        ("map", "numbers.json", b"[" + b"1e5," * 40_000_000 + b"1]"),
        ("map", "many_layers.json", json.dumps({**one_layer(), "moe_layer_count": huge}).encode()),
        ("map", "many_devices.json", json.dumps(one_layer(device_count=huge)).encode()),
        ("map", "layer_id.json", json.dumps(one_layer(layer_id=huge)).encode()),
        (
            "map",
            "expert_id.json",
            json.dumps(one_layer(device_list=[{"device_id": 0, "device_expert": [0, huge]}])).encode(),
        ),
        (
            "map",
            "device_id.json",
            json.dumps(one_layer(device_list=[{"device_id": huge, "device_expert": [0, 1]}])).encode(),
        ),
        ("map", "digits.json", b'{"moe_layer_count": ' + b"9" * 5_000_000 + b"}"),
        ("vllm", "vllm.json", b'{"physical_to_logical_map": [[0, 1, ' + b"9" * 18 + b"]]}"),
        ("yaml", "aliases.yaml", b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n"),
        ("yaml", "deep.yaml", b"[" * 200_000),
        ("yaml", "values.yaml", b"[" + b"1," * 16_000_000 + b"1]"),
        ("yaml", "count.yaml", b"num_slots: 1" + b"0" * 30 + b"\ninitial_global_assignments: {0: [0]}\n"),
        ("trace", "shape.safetensors", safetensors([10**6, 10**3, 10**3], 8 * 10**12)),
        ("trace", "overflow.safetensors", safetensors([2**32, 2**32, 2], 0)),
        ("trace", "header.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("trace", "half_header.safetensors", (2**27).to_bytes(8, "little") + b"{" * 64),
        ("cost", "shape.npy", npy((10**7, 10**6))),
        ("cost", "object.npy", npy((2, 2)).replace(b"'<f8'", b"'|O' ")),
        ("cost", "deep.json", b"[" * 500_000),
    ]
    for _, name, content in files:
        (folder / name).write_bytes(content)
    bombs = [("location", "bomb.pt"), ("location", "lists.pt"), ("recorder", "references.pt")]
    zipped(folder / "bomb.pt", b"\0" * (64 << 20), compressed=True)
    zipped(folder / "lists.pt", b"\x80\x02(" + b"]" * 30_000_000 + b"l.")
    zipped(folder / "references.pt", many_references())
    for reader, key, name in (
        ("location", "physical_to_logical_map", "strides.pt"),
        ("recorder", "logical_count", "strides_of_counts.pt"),
    ):
        torch.save(
            {key: torch.zeros(1, dtype=torch.int64).expand(10**6, 10**7), "records": []}, folder / name
        )
        bombs.append((reader, name))
    np.save(folder / "complex.npy", np.zeros((2, 2), dtype=np.complex128))
    asked = [(reader, name) for reader, name, _ in files] + bombs + [("cost", "complex.npy")]
    lines = "".join(json.dumps([reader, str(folder / name)]) + "\n" for reader, name in asked)
    ended = subprocess.run(
        [sys.executable, "-c", READER, str(EXTRA_BYTES), str(folder / "first.pt")],
        input=lines, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(answers) == len(asked), f"the reader died after {answers[-1:]}: {ended.stderr[-2000:]}"
    return {f"{reader} {name}": (outcome, seconds) for reader, name, outcome, seconds in answers}


def test_every_hostile_file_is_refused_with_one_line(said: dict[str, tuple[str, float]]) -> None:
    assert len(said) == 27
    wrong = {
        name: line for name, (line, _) in said.items() if not line.startswith("refused: ") or "\n" in line
    }
    assert wrong == {}
    assert all(len(line) < 600 for line, _ in said.values())


def test_none_takes_long(said: dict[str, tuple[str, float]]) -> None:
    """Not how fast, only that the time is bounded: a file that needs minutes is a fault, too."""
    assert {name: seconds for name, (_, seconds) in said.items() if seconds > 60} == {}
