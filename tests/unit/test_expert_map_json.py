from __future__ import annotations

import json
import os
import pickle
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_platform import ExpertMap, Topology
from eplb_platform.records import Fault, RecordError, expert_map_json, strict_json
from eplb_platform.records.atomic import write_atomically
from tests.unit.strategies import expert_maps

KNOWN = ExpertMap([[7, 2, 0, 3, 5, 6, 1, 4, 7, 2], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]], 8, Topology(2))
# As vllm-ascend writes it.
DOCUMENT: dict[str, Any] = {
    "moe_layer_count": 2,
    "layer_list": [
        {
            "layer_id": 0,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [7, 2, 0, 3, 5]},
                {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]},
            ],
        },
        {
            "layer_id": 1,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [0, 1, 2, 3, 4]},
                {"device_id": 1, "device_expert": [5, 6, 7, 0, 1]},
            ],
        },
    ],
}
Change = Callable[[dict[str, Any]], object]


def layer(document: Any, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = document["layer_list"][index]
    return found


def device(document: Any, of_layer: int = 0, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = layer(document, of_layer)["device_list"][index]
    return found


def changed(change: Change) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(DOCUMENT))
    change(document)
    return document


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "map.json"


def test_a_known_file_is_read(path: Path) -> None:
    path.write_text(json.dumps(DOCUMENT))
    assert expert_map_json.read(path) == KNOWN
    assert expert_map_json.faults(path) == []
    assert expert_map_json.read(str(path), num_logical_experts=8, topology=Topology(2)) == KNOWN


def test_what_is_written_is_the_known_document(path: Path) -> None:
    expert_map_json.write(path, KNOWN)
    assert json.loads(path.read_text()) == DOCUMENT


def test_order_and_further_keys_do_not_matter(path: Path) -> None:
    document = changed(lambda d: (d["layer_list"].reverse(), layer(d)["device_list"].reverse()))
    document["written_by"] = {"name": "another tool", "versions": [1.5, None]}
    layer(document)["note"] = "x"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document, indent=4).encode())
    assert expert_map_json.read(path) == KNOWN


@given(expert_maps())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, expert_map: ExpertMap
) -> None:
    path = tmp_path_factory.mktemp("maps") / "map.json"
    expert_map.save(path)
    assert ExpertMap.load(path, topology=expert_map.topology) == expert_map


def test_nodes_and_inactive_ranks_are_the_topology_s(path: Path) -> None:
    topology = Topology(4, num_nodes=2, active_ranks=(0, 1, 3))
    expert_map = ExpertMap.initial(2, 6, topology)
    expert_map.save(path)
    assert ExpertMap.load(path, topology=topology) == expert_map
    place = "layer_list[0].device_list[2].device_expert[0]"
    assert expert_map_json.faults(path)[0] == Fault(place, "-1, expected an expert from 0 to 5")
    other = expert_map_json.faults(path, topology=Topology(4, active_ranks=(0, 1, 2)))
    assert (
        Fault("layer_list[0].device_list[3].device_expert[0]", "4, expected -1 on an inactive rank") in other
    )


DEVICE = "layer_list[0].device_list[0]"
OTHER_DEVICE = "layer_list[0].device_list[1]"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.pop("moe_layer_count"), ["moe_layer_count: missing, expected an integer"]),
        (lambda d: d.update(moe_layer_count=3), ["moe_layer_count: 3, but layer_list has 2 layers"]),
        (lambda d: d.update(moe_layer_count="2"), ["moe_layer_count: '2', expected an integer"]),
        (lambda d: d.update(layer_list={}), ["layer_list: {}, expected a list that is not empty"]),
        (
            lambda d: layer(d).update(device_count=3),
            ["layer_list[0].device_count: 3, but device_list has 2 devices"],
        ),
        (
            lambda d: layer(d, 1).update(layer_id=0),
            ["layer_list[1].layer_id: 0, which layer_list[0] has already"],
        ),
        (lambda d: layer(d, 1).update(layer_id=2), ["layer_list[1].layer_id: 2, expected 0 to 1"]),
        (lambda d: layer(d, 1).update(layer_id=True), ["layer_list[1].layer_id: True, expected an integer"]),
        (
            lambda d: device(d, 0, 1).update(device_id=0),
            [f"{OTHER_DEVICE}.device_id: 0, which {DEVICE} has already"],
        ),
        (lambda d: device(d).update(device_id=5), [f"{DEVICE}.device_id: 5, expected 0 to 1"]),
        (
            lambda d: layer(d)["device_list"].append({"device_id": 2, "device_expert": [0] * 5}),
            [
                "layer_list[0].device_list: 3 devices, expected 2 as in other layers",
                "layer_list[0].device_count: 2, but device_list has 3 devices",
                "layer_list[0].device_list[2].device_id: 2, expected 0 to 1",
            ],
        ),
        (
            lambda d: layer(d)["device_list"].insert(0, 5),
            [
                "layer_list[0].device_list: 3 devices, expected 2 as in other layers",
                "layer_list[0].device_count: 2, but device_list has 3 devices",
                f"{DEVICE}: 5, expected an object",
            ],
        ),
        (
            lambda d: device(d).update(device_expert=[]),
            [f"{DEVICE}.device_expert: [], expected a list that is not empty"],
        ),
        (
            lambda d: device(d)["device_expert"].pop(),
            [
                f"{DEVICE}.device_expert: 4 slots, expected 5 as on other devices",
                "layer_list[0]: no device holds expert 5",
            ],
        ),
        (
            lambda d: device(d)["device_expert"].__setitem__(0, -1),
            [f"{DEVICE}.device_expert[0]: -1, expected an expert from 0 to 7"],
        ),
        (
            lambda d: device(d)["device_expert"].__setitem__(1, 2.0),
            [f"{DEVICE}.device_expert[1]: 2.0, expected the integer id of an expert"],
        ),
        (
            lambda d: device(d)["device_expert"].__setitem__(2, True),
            [f"{DEVICE}.device_expert[2]: True, expected the integer id of an expert"],
        ),
        (
            lambda d: device(d)["device_expert"].__setitem__(2, "0"),
            [f"{DEVICE}.device_expert[2]: '0', expected the integer id of an expert"],
        ),
        (
            lambda d: device(d)["device_expert"].__setitem__(2, 10**30),
            [f"{DEVICE}.device_expert[2]: {10**30}, expected the integer id of an expert"],
        ),
        (
            lambda d: device(d)["device_expert"].__setitem__(2, 10**9),
            [f"{DEVICE}.device_expert[2]: {10**9}, expected an expert from 0 to 7"],
        ),
        (
            lambda d: device(d)["device_expert"].__setitem__(2, 7),
            ["layer_list[0]: no device holds expert 0"],
        ),
        (
            lambda d: device(d, 1, 1).update(device_expert=[0] * 5),
            ["layer_list[1]: no device holds experts 5, 6, 7"],
        ),
        (
            # Two faults of different kinds, in different layers.
            lambda d: (layer(d).update(layer_id=-1), device(d, 1)["device_expert"].__setitem__(4, None)),
            [
                "layer_list[0].layer_id: -1, expected 0 to 1",
                "layer_list[1].device_list[0].device_expert[4]: None, expected the integer id of an expert",
            ],
        ),
    ],
)
def test_every_fault_is_listed_with_its_place(path: Path, change: Change, expected: list[str]) -> None:
    path.write_text(json.dumps(changed(change)))
    assert [str(fault) for fault in expert_map_json.faults(path)] == expected
    more = len(expected) - 1
    rest = {0: "", 1: " (and 1 more fault)"}.get(more, f" (and {more} more faults)")
    with pytest.raises(RecordError) as caught:
        ExpertMap.load(path)
    assert str(caught.value) == f"{path}: {expected[0]}{rest}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": Topology(4)}, "layer_list: 2 devices in a layer, expected 4 ranks"),
        ({"num_logical_experts": 16}, "layer_list: 8 logical experts in every layer, expected 16"),
        ({"num_logical_experts": 4}, "layer_list: 8 logical experts in every layer, expected 4"),
    ],
)
def test_a_map_for_something_else_is_refused(path: Path, options: Any, message: str) -> None:
    path.write_text(json.dumps(DOCUMENT))
    assert [str(fault) for fault in expert_map_json.faults(path, **options)] == [message]
    with pytest.raises(RecordError, match=re.escape(message)):
        ExpertMap.load(path, **options)


def test_the_model_s_experts_show_one_that_is_missing_everywhere(path: Path) -> None:
    path.write_text(json.dumps(changed(lambda d: device(d)["device_expert"].__setitem__(0, 9))))
    faults = expert_map_json.faults(path, num_logical_experts=8)
    assert [str(fault) for fault in faults] == [
        f"{DEVICE}.device_expert[0]: 9, expected an expert from 0 to 7"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: no valid JSON: Expecting value"),
        (json.dumps(DOCUMENT)[:-10], "no valid JSON: "),
        (json.dumps(DOCUMENT) + "}", "no valid JSON: Extra data"),
        ("[1]", "[1], expected an object with moe_layer_count and layer_list"),
        ("null", "None, expected an object"),
        (json.dumps(DOCUMENT).replace("[7", "[NaN"), "no valid JSON: NaN is no value"),
        (json.dumps(DOCUMENT).replace("[7", "[-Infinity"), "no valid JSON: -Infinity is no value"),
        (
            json.dumps(DOCUMENT).replace('"layer_id": 0', '"layer_id": 1, "layer_id": 0'),
            "layer_list[0]: the key 'layer_id' stands more than once",
        ),
        ("[" * 200_000, "nested too deeply"),
        ('{"layer_list": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "a number has too many digits"),
    ],
)
def test_what_is_no_map_at_all_is_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    (fault,) = expert_map_json.faults(path)
    assert message in str(fault)
    with pytest.raises(RecordError, match=re.escape(message)):
        ExpertMap.load(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(path: str | Path) -> str:
        with pytest.raises(RecordError) as caught:
            expert_map_json.read(path)
        assert expert_map_json.faults(path) == [caught.value.fault]
        return str(caught.value)

    missing, pipe, binary = tmp_path / "none.json", tmp_path / "pipe", tmp_path / "binary.json"
    assert refusal(missing) == f"{missing}: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: a folder, expected a file"
    os.mkfifo(pipe)
    assert refusal(pipe) == f"{pipe}: no plain file, expected a file"
    binary.write_bytes(b"{\xff}")
    assert refusal(binary) == f"{binary}: byte 1: no UTF-8 text: invalid start byte"
    assert refusal("a\0b") == r"'a\x00b': embedded null byte"
    assert refusal("") == "'': No such file or directory"
    monkeypatch.setattr(strict_json, "MAX_FILE_BYTES", 2)
    assert refusal(binary) == f"{binary}: 3 bytes, expected at most 2"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(RecordError, match="Permission denied"):
        expert_map_json.read(path)


def test_the_list_of_faults_is_bounded(path: Path) -> None:
    path.write_text(json.dumps(changed(lambda d: device(d).update(device_expert=[99] * 500))))
    faults = expert_map_json.faults(path)
    assert len(faults) == 101
    assert faults[-1] == Fault("", "and 401 more faults")
    assert str(expert_map_json.faults(path, limit=2)[-1]) == "and 499 more faults"


@given(st.data())
def test_whatever_is_in_a_file_is_a_map_or_a_list_of_faults(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One value anywhere in a good file is replaced by anything."""
    document = changed(lambda d: None)
    node: Any = document
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    leaves = (
        st.none() | st.booleans() | st.integers(-3, 9) | st.integers() | st.floats() | st.text(max_size=3)
    )
    node[key] = data.draw(st.recursive(leaves, st.lists) | st.dictionaries(st.text(max_size=3), leaves))
    path = tmp_path_factory.mktemp("maps") / "map.json"
    path.write_text(json.dumps(document))
    for options in ({}, {"num_logical_experts": 8, "topology": Topology(2)}):
        faults = expert_map_json.faults(path, **options)
        assert all("\n" not in str(fault) and len(str(fault)) < 300 for fault in faults)
        try:
            ExpertMap.load(path, **options)
        except RecordError:
            assert faults
        else:
            assert not faults


def test_errors_survive_the_way_between_processes(path: Path) -> None:
    error = RecordError(path, Fault("layer_list[0]", "no device holds expert 1"))
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.path, copied.fault) == (str(error), str(path), error.fault)


def test_folders_that_are_missing_are_made(tmp_path: Path) -> None:
    KNOWN.save(tmp_path / "a" / "b" / "map.json")
    assert ExpertMap.load(tmp_path / "a" / "b" / "map.json") == KNOWN


def test_a_path_without_a_folder_is_in_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    KNOWN.save("map.json")
    assert ExpertMap.load("map.json") == KNOWN


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecordError, match="Is a directory"):
        KNOWN.save(tmp_path, format="json")
    with pytest.raises(RecordError, match=r"map\.json: "):
        KNOWN.save(tmp_path / "file" / "map.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_half_way_keeps_the_old_file(path: Path) -> None:
    path.write_text("old")

    def fail_half_way(file: BinaryIO) -> None:
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail_half_way)
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["map.json"]


def test_a_reader_keeps_the_whole_old_file(path: Path) -> None:
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"newer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"newer"


def test_written_files_have_the_permissions_of_any_new_file(path: Path) -> None:
    other = path.with_name("other")
    other.touch()
    write_atomically(path, b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
