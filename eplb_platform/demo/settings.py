"""What `eplb demo` is asked to do, checked in full before any process starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from eplb_platform.demo.checkpoint_shape import CheckpointShape, read_shape

PACKAGE = Path(__file__).parent
CHECKPOINT = PACKAGE / "checkpoint"
OUTPUT = Path("eplb-demo")
MOST_RANKS = 64
MOST_REDUNDANCY = 4
"""Redundant experts at most, in multiples of the logical experts: beyond that it is a slip of the pen."""


def shipped_texts() -> tuple[Path, ...]:
    return tuple(sorted((PACKAGE / "texts").glob("*.txt")))


@dataclass(frozen=True)
class Serving:
    """How much is served in one forward pass."""

    sequences: int = 256
    """On all ranks together: the fewer tokens a pass has, the more its balancedness is a matter of chance."""
    prompt_tokens: int = 12
    forwards_per_batch: int = 24
    """One prefill and then decode steps; then the next batch of sequences comes in."""

    def sequences_of_rank(self, ranks: int) -> int:
        return -(-self.sequences // ranks)


@dataclass(frozen=True)
class DemoSettings:
    """Options of the demo. `redundant_experts=None` chooses about a quarter of the experts."""

    ranks: int = 4
    redundant_experts: int | None = None
    model: Path = CHECKPOINT
    texts: tuple[Path, ...] = field(default_factory=shipped_texts)
    backend: str = "auto"
    seed: int = 0
    expert_map_record_path: Path = OUTPUT / "expert_map.json"
    expert_map_path: Path | None = None
    heat_interval: int = 48
    plan_interval: int = 8
    steps: int = 480
    picture: Path = OUTPUT / "load.png"
    serving: Serving = Serving()

    def quick(self) -> DemoSettings:
        """The same with far fewer forward passes: to see that everything works, not how well."""
        return replace(self, steps=96, heat_interval=24, plan_interval=4, serving=Serving(64, 8, 16))


@dataclass(frozen=True)
class CheckedSettings:
    """Settings that fit together, with what was derived while checking them."""

    options: DemoSettings
    shape: CheckpointShape
    redundant_experts: int

    @property
    def num_physical_experts(self) -> int:
        return self.shape.num_logical_experts + self.redundant_experts


def check(options: DemoSettings) -> CheckedSettings:
    """Check every option; the ValueError names the first wrong one, its value and what would do."""
    shape = read_shape(options.model)
    if not 2 <= options.ranks <= MOST_RANKS:
        raise ValueError(f"--ranks {options.ranks}: expected 2 to {MOST_RANKS}")
    if options.ranks > shape.num_logical_experts * (1 + MOST_REDUNDANCY):
        raise ValueError(
            f"--ranks {options.ranks}: more than the {shape.num_logical_experts} experts can fill"
        )
    longest = options.serving.prompt_tokens + options.serving.forwards_per_batch
    if longest > shape.max_positions:
        raise ValueError(f"{options.model}: takes {shape.max_positions} tokens, the demo serves {longest}")
    redundant = _redundant_experts(options, shape.num_logical_experts)
    _check_texts(options)
    _check_numbers(options)
    _check_paths(options)
    checked = CheckedSettings(options, shape, redundant)
    _check_map(checked)
    return checked


def _redundant_experts(options: DemoSettings, experts: int) -> int:
    """Redundant experts such that every rank has the same number of slots."""
    if options.redundant_experts is None:
        return _dividing(experts, options.ranks, experts // 4)
    given = options.redundant_experts
    if given > MOST_REDUNDANCY * experts:
        raise ValueError(
            f"--redundant-experts {given}: more than {MOST_REDUNDANCY} times the {experts} experts"
        )
    if given < 0 or (experts + given) % options.ranks:
        above = _dividing(experts, options.ranks, max(given, 0))
        fitting = [n for n in (above - options.ranks, above) if n >= 0]
        nearest = min(fitting, key=lambda n: abs(n - given))
        raise ValueError(
            f"--redundant-experts {given}: {experts} + {given} experts do not spread evenly over "
            f"{options.ranks} ranks; the nearest number that does is {nearest}"
        )
    return given


def _dividing(experts: int, ranks: int, least: int) -> int:
    """The smallest number from `least` on that makes the slots divide evenly over the ranks."""
    return least + (-(experts + least)) % ranks


def _check_texts(options: DemoSettings) -> None:
    if not options.texts:
        raise ValueError("--text: no text to serve")
    needed = options.serving.prompt_tokens
    for path in options.texts:
        try:
            size = len(path.read_bytes())
        except OSError as error:
            raise ValueError(f"--text {path}: cannot be read: {error.strerror}") from error
        if size <= needed:
            raise ValueError(f"--text {path}: has {size} bytes, at least {needed + 1} are needed")


def _check_numbers(options: DemoSettings) -> None:
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed}: expected a whole number of at least 0")
    if options.heat_interval < 1:
        raise ValueError(f"--heat-interval {options.heat_interval}: expected at least 1")
    if options.plan_interval < 0:
        raise ValueError(f"--plan-interval {options.plan_interval}: expected at least 0")
    least = 2 * (options.heat_interval + options.plan_interval)
    if options.steps < least:
        raise ValueError(
            f"--steps {options.steps}: expected at least {least}, twice the two intervals together"
        )


def _check_paths(options: DemoSettings) -> None:
    """Refuse a path that is a folder or lies under a file now, not after minutes of serving."""
    for name, path in (
        ("--picture", options.picture),
        ("--expert-map-record-path", options.expert_map_record_path),
    ):
        if path.is_dir():
            raise ValueError(f"{name} {path}: is a folder, expected a file")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise ValueError(f"{name} {path}: {parent} is not a folder")
        if not os.access(path if path.exists() else parent, os.W_OK):
            raise ValueError(f"{name} {path}: cannot be written")
    if options.picture.suffix.lower() != ".png":
        raise ValueError(f"--picture {options.picture}: expected a name that ends in .png")
    if options.expert_map_record_path.suffix.lower() != ".json":
        raise ValueError(
            f"--expert-map-record-path {options.expert_map_record_path}: expected a name that ends in .json"
        )


def _check_map(checked: CheckedSettings) -> None:
    """A given map must be for this model and number of ranks, with the slots that the other phases have."""
    from eplb_platform.expert_map import ExpertMap
    from eplb_platform.topology import Topology

    options = checked.options
    if options.expert_map_path is None:
        return
    topology = Topology(options.ranks)
    given = ExpertMap.load(
        options.expert_map_path, num_logical_experts=checked.shape.num_logical_experts, topology=topology
    )
    if given.num_layers != checked.shape.num_layers:
        raise ValueError(
            f"--expert-map-path {options.expert_map_path}: has {given.num_layers} layers, "
            f"the model has {checked.shape.num_layers}"
        )
