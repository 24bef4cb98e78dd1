"""One file of a map whose stages know only their own layers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import TCPStore

from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm.stage_recording import StageMapRecorder
from eplb_platform.records import RecordError
from eplb_platform.topology import Topology

TOPOLOGY = Topology(2)


@pytest.fixture
def store() -> Iterator[TCPStore]:
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def stage_map(*layers: list[int]) -> ExpertMap:
    return ExpertMap(np.array(layers), 4, TOPOLOGY)


def record(recorder: StageMapRecorder, expert_map: ExpertMap, *, keep_earlier: bool = False) -> None:
    asyncio.run(recorder.record(expert_map, keep_earlier=keep_earlier))


def test_the_file_comes_with_the_last_stage_and_has_the_layers_in_order(
    tmp_path: Path, store: TCPStore
) -> None:
    path = tmp_path / "map.json"
    first, last = (StageMapRecorder(path, stage, 2, store) for stage in range(2))
    record(last, stage_map([3, 2, 1, 0]))
    assert not path.exists()
    record(first, stage_map([0, 1, 2, 3], [1, 0, 2, 3]))
    assert ExpertMap.load(path).physical_to_logical.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0]]
    record(last, stage_map([2, 3, 1, 0]))
    assert ExpertMap.load(path).physical_to_logical.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 3, 1, 0]]


def test_a_map_from_no_load_replaces_none_of_this_run(tmp_path: Path, store: TCPStore) -> None:
    path = tmp_path / "map.json"
    recorder = StageMapRecorder(path, 0, 1, store)
    record(recorder, stage_map([3, 2, 1, 0]))
    record(recorder, stage_map([0, 1, 2, 3]), keep_earlier=True)
    assert ExpertMap.load(path).physical_to_logical.tolist() == [[3, 2, 1, 0]]


def test_after_stages_that_write_at_once_the_file_has_the_last_map_of_each(
    tmp_path: Path, store: TCPStore
) -> None:
    path = tmp_path / "map.json"
    maps = [stage_map(list(np.random.default_rng(seed).permutation(4))) for seed in range(12)]

    def run(stage: int) -> None:
        recorder = StageMapRecorder(path, stage, 3, store)
        for expert_map in maps[stage::3]:
            record(recorder, expert_map)

    threads = [threading.Thread(target=run, args=(stage,)) for stage in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = [maps[9 + stage].physical_to_logical[0].tolist() for stage in range(3)]
    assert ExpertMap.load(path).physical_to_logical.tolist() == expected


def test_a_path_that_cannot_be_written_is_said(tmp_path: Path, store: TCPStore) -> None:
    (tmp_path / "a_file").touch()
    recorder = StageMapRecorder(tmp_path / "a_file" / "map.json", 0, 1, store)
    with pytest.raises(RecordError, match="a_file"):
        record(recorder, stage_map([0, 1, 2, 3]))
