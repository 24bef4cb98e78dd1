"""One expert-map file of a model whose pipeline stages each balance their own layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eplb_platform.expert_map import ExpertMap

if TYPE_CHECKING:
    from torch.distributed import Store


class StageMapRecorder:
    """A `Recorder` of one stage: publishes its layers in the store, and writes the file once it knows all.

    Whoever finds that another stage published meanwhile writes again, so that the last file written has the
    last map of every stage.
    """

    def __init__(self, path: str | Path, stage: int, num_stages: int, store: Store) -> None:
        self._path = Path(path)
        self._stage = stage
        self._num_stages = num_stages
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
        self._has_recorded = False

    async def record(self, expert_map: ExpertMap, *, keep_earlier: bool) -> None:
        """As `Recorder.record`; raises RecordError when the file cannot be written."""
        if keep_earlier and self._has_recorded:
            return
        self._store.set(_key(self._stage), json.dumps(expert_map.physical_to_logical.tolist()))
        version = self._store.add("map/version", 1)
        while self._write(expert_map) and (now := self._store.add("map/version", 0)) != version:
            version = now
        self._has_recorded = True

    def _write(self, own: ExpertMap) -> bool:
        """False while a stage has not published anything yet: it will write then."""
        keys = [_key(stage) for stage in range(self._num_stages)]
        if not self._store.check(keys):
            return False
        parts = [np.array(json.loads(self._store.get(key)), dtype=np.int32) for key in keys]
        layers = np.concatenate([part for part in parts if part.size])
        ExpertMap(layers, own.num_logical_experts, own.topology).save(self._path)
        return True


def _key(stage: int) -> str:
    return f"map/stage-{stage}"
