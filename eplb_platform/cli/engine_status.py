"""`eplb status`: what the balancers of a running engine do, in words, from its metrics or its state files."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from eplb_platform.cli import BadInput

MAX_BYTES = 1 << 24
TIMEOUT_S = 10.0

# Possessive: what does not match costs no more than its length, whatever an endpoint sends.
_QUOTED = r'"(?P<value>(?:[^"\\]|\\.)*+)"'
_LABEL = re.compile(rf"(?P<key>\w++)={_QUOTED}")
_LABELS = rf"(?:\w++={_QUOTED.replace('?P<value>', '?:')},?+)*+"
_SAMPLE = re.compile(
    rf"eplb_(?P<name>\w+?)(?:_total)?\{{(?P<labels>{_LABELS})\}} (?P<value>[^ ]{{1,64}})(?: \d+)?"
)
_STAGES_IN_WORDS = {
    "start": "starting a cycle",
    "rebuild": "rebuilding its group",
    "collect": "collecting the load",
    "trace": "adding to the load trace",
    "plan": "planning",
    "broadcast": "sending the plan",
    "compare": "comparing the plan",
    "schedule": "scheduling the moves",
    "fetch": "moving weights",
    "agree": "agreeing on a commit",
    "commit": "waiting for the forward pass that commits",
    "record": "recording the map",
    "closed": "closed",
    "paused": "paused",
    "inactive": "inactive",
    "idle": "idle",
}

Labels: TypeAlias = tuple[tuple[str, str], ...]
Samples: TypeAlias = Mapping[str, Mapping[Labels, float]]
"""By the metric's name, then by its own labels."""


@dataclass(frozen=True)
class ModelState:
    """One model of one pipeline stage, as its metrics tell."""

    model: str
    stage: str
    samples: Samples

    def value(self, name: str) -> float | None:
        """Of a metric without labels of its own; None where it is not exported."""
        return self.samples.get(name, {}).get(())

    def by_label(self, name: str, key: str) -> dict[str, float]:
        """Of a metric with the label `key`, by that label's value."""
        samples = ((dict(labels), value) for labels, value in self.samples.get(name, {}).items())
        return {labels[key]: value for labels, value in samples if key in labels}

    @property
    def state(self) -> str:
        """The balancer's, on the rank that plans."""
        return next((state for state, on in self.by_label("state", "state").items() if on), "unknown")

    @property
    def silent_ranks(self) -> list[int]:
        """Ranks that are not alive."""
        return sorted(int(rank) for rank, alive in self.by_label("alive", "rank").items() if not alive)

    @property
    def missing(self) -> dict[int, list[int]]:
        """The ranks that others wait for, and who waits."""
        waiting: dict[int, list[int]] = {}
        for labels in self.samples.get("waiting_for_rank", {}):
            names = dict(labels)
            if not {"rank", "missing_rank"} <= names.keys():
                continue
            waiting.setdefault(int(names["missing_rank"]), []).append(int(names["rank"]))
        return {rank: sorted(others) for rank, others in sorted(waiting.items())}

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "model": self.model,
            "pipeline_stage": self.stage,
            "state": self.state,
            "waits_for_ranks": list(self.missing),
            "silent_ranks": self.silent_ranks,
            "cycles": {name: int(value) for name, value in self.by_label("cycles", "outcome").items()},
            "last_cycle_age_s": self.value("last_cycle_age_seconds"),
            "last_success_age_s": self.value("last_success_age_seconds"),
            "map_age_s": self.value("map_age_seconds"),
            "next_cycle_in_steps": self.value("next_cycle_steps"),
            "load_balance_ratio": self.value("load_balance_ratio"),
            "stage_running_s": self.by_label("stage_running_seconds", "rank"),
            "stalls": int(sum(self.by_label("stalls", "rank").values())),
        }

    def lines(self) -> list[str]:
        """For people."""
        where = f"{self.model}" + (f", pipeline stage {self.stage}" if self.stage != "0" else "")
        return [f"{where}: {self._doing()}", *(f"  {line}" for line in self._details())]

    def _doing(self) -> str:
        running = self.by_label("stage_running_seconds", "rank")
        longest = max(running.values(), default=0.0)
        doing = _STAGES_IN_WORDS.get(self.state, self.state)
        ranks = len(self.by_label("alive", "rank"))
        slow = f" for {_span(longest)}" if longest >= 1 else ""
        return f"{doing}{slow} ({ranks} rank{'s' * (ranks != 1)})"

    def _details(self) -> Iterator[str]:
        success, cycle = self.value("last_success_age_seconds"), self.value("last_cycle_age_seconds")
        yield (
            "last success: "
            + ("none yet" if success is None else f"{_span(success)} ago")
            + ("" if cycle is None else f"; last cycle ended {_span(cycle)} ago")
        )
        counts = ", ".join(
            f"{int(count)} {name.replace('_', ' ')}"
            for name, count in self.by_label("cycles", "outcome").items()
        )
        yield f"cycles: {counts or 'none'}; experts moved: {int(self.value('moved_experts') or 0)}"
        if (ratio := self.value("load_balance_ratio")) is not None:
            worst = self.value("worst_layer_load_balance_ratio")
            yield f"balancedness: {ratio:.3f}" + ("" if worst is None else f", worst layer {worst:.3f}")
        yield f"waits for: {self._waits_for()}"
        if self.silent_ranks:
            yield f"not heard of, or stuck in a step: rank {', '.join(map(str, self.silent_ranks))}"

    def _waits_for(self) -> str:
        if self.missing:
            return "; ".join(
                f"rank {rank} (missed by rank {', '.join(map(str, others))})"
                for rank, others in self.missing.items()
            )
        steps = self.value("next_cycle_steps")
        if self.state == "idle" and steps is not None:
            return f"{int(steps)} more forward passes until the next cycle"
        if self.state == "commit":
            return "the next forward passes, which an idle engine does not make"
        return {"paused": "`resume`", "inactive": "a `resize` with this rank", "closed": "nothing"}.get(
            self.state, "the end of this stage"
        )


def read_status(target: str) -> list[ModelState]:
    """The models of the engine at `target`: the address of its metrics, a state file or a folder of them.

    Raises BadInput for what cannot be reached or read, is too large, or says nothing of a balancer.
    """
    text = _fetch(target) if re.match(r"https?://", target) else _from_files(Path(target))
    models = parse(text)
    if not models:
        raise BadInput(f"status: {target}: no metrics of a balancer (eplb_...) there")
    return models


def parse(text: str) -> list[ModelState]:
    """Samples in Prometheus' text format; lines that are not of a balancer are passed over."""
    found: dict[tuple[str, str], dict[str, dict[Labels, float]]] = {}
    for line in text.splitlines():
        sample = _SAMPLE.fullmatch(line) if line.startswith("eplb_") else None
        value = _number(sample["value"]) if sample else None
        if sample is None or value is None:
            continue
        labels = {match["key"]: _unescaped(match["value"]) for match in _LABEL.finditer(sample["labels"])}
        if "model" not in labels or not all(_is_rank(labels.get(key)) for key in ("rank", "missing_rank")):
            continue
        place = labels.pop("model"), labels.pop("pipeline_stage", "0")
        own: Labels = tuple(sorted(labels.items()))
        found.setdefault(place, {}).setdefault(sample["name"], {})[own] = value
    return [ModelState(model, stage, samples) for (model, stage), samples in sorted(found.items())]


def _fetch(address: str) -> str:
    """As `_read`, given up where an answer comes too slowly: a socket's time-out is for each piece of it."""
    answers: list[str | Exception] = []

    def ask() -> None:
        try:
            answers.append(_read(address))
        except Exception as error:
            answers.append(error)

    asking = threading.Thread(target=ask, name="eplb-status", daemon=True)
    asking.start()
    asking.join(1.5 * TIMEOUT_S)
    answer = answers[0] if answers else BadInput(f"status: {address}: not read within {TIMEOUT_S:g} s")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _read(address: str) -> str:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    deadline = time.monotonic() + TIMEOUT_S
    try:
        with urlopen(Request(address, headers={"Accept": "text/plain"}), timeout=TIMEOUT_S) as answer:
            content = bytearray()
            while piece := answer.read1(1 << 16):
                content += piece
                if len(content) > MAX_BYTES:
                    raise BadInput(f"status: {address}: more than {MAX_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise BadInput(f"status: {address}: not read within {TIMEOUT_S:g} s")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        why = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise BadInput(f"status: {address}: {why}") from error
    return content.decode(errors="replace")


def _from_files(path: Path) -> str:
    """What a scrape would show of the state files."""
    from prometheus_client import CollectorRegistry, generate_latest

    from eplb_platform.snapshot_files import read_snapshot, read_snapshots
    from eplb_platform.telemetry import SnapshotCollector

    if path.is_dir():
        snapshots = read_snapshots(path)
    elif path.is_file():
        snapshot = read_snapshot(path)
        if snapshot is None:
            raise BadInput(f"status: {path}: no state file of a balancer")
        snapshots = [snapshot]
    else:
        raise BadInput(f"status: {path}: no such file or folder; an address begins with http://")
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(lambda: snapshots))
    return generate_latest(registry).decode()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_rank(text: str | None) -> bool:
    return text is None or re.fullmatch(r"\d{1,9}", text) is not None


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def lines(models: Sequence[ModelState]) -> list[str]:
    """All models, for people; what a model is called never spans lines, nor controls a terminal."""
    return [_printable(line) for model in models for line in model.lines()]


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in line)
