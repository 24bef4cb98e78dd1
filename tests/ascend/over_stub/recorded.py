"""What the stub of CANN was asked for, read back from its record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

Call = dict[str, object]


def calls_of(action: Callable[[], object]) -> list[Call]:
    """What this process called of HCCL, and which operators by name, while `action` ran."""
    path = Path(os.environ["CANN_STUB_RECORD"], f"{os.getpid()}.jsonl")
    before = path.stat().st_size if path.exists() else 0
    action()
    if not path.exists():
        return []
    with path.open() as file:
        file.seek(before)
        return [json.loads(line) for line in file]


def of_hccl(calls: list[Call]) -> list[Call]:
    return [call for call in calls if str(call["call"]).startswith("Hccl")]
