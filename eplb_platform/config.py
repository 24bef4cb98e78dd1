"""EplbConfig: the keys of `eplb_config`, checked, with a message that says what to write instead."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from hashlib import blake2b
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eplb_platform.expert_map import FORMAT_OF_SUFFIX

SECTION = "eplb_config"

_ALGORITHM_OF_NUMBER = ("random", "deepseek", "swift_balancer", "flashlb")
# Two names for one key: vLLM's, and vllm-ascend's.
_SYNONYMS = {"eplb_heat_collection_stage": "load_collection_phase"}
# The names of the first release, at top level then.
_FORMER_NAMES = {
    "num_iterations_eplb_update": "expert_heat_collection_interval",
    "num_wait_worker_iterations": "algorithm_execution_interval",
    "init_redundancy_expert": "num_redundant_experts",
}
_WITHOUT_EFFECT = "gate_eplb"
# TensorRT-LLM's, with the folder that it takes where only the range is given.
_STATISTIC_PATH, _STATISTIC_RANGE = "EXPERT_STATISTIC_PATH", "EXPERT_STATISTIC_ITER_RANGE"
_STATISTIC_FOLDER = "expert_statistic"
# Too common a word to be taken for ours outside of `eplb_config`.
_NEVER_AT_TOP_LEVEL = frozenset({"backend", "transport"})


class ConfigError(ValueError):
    """A configuration that cannot be used; one line that names the key, the value and what was expected."""


class Mode(StrEnum):
    """What the configuration asks for; see the properties of EplbConfig for what that includes."""

    OFF = "off"
    STATIC = "static"
    RECORD = "record"
    DYNAMIC = "dynamic"


@dataclass(frozen=True)
class _Expected:
    """What a key's value must be, in the words of its error message."""

    text: str


def _policy(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, int) and not 0 <= value < len(_ALGORITHM_OF_NUMBER)):
        raise ValueError("no number of an algorithm")
    if isinstance(value, str) and (not value.strip() or value.strip().isdecimal()):
        raise ValueError("no name of an algorithm")
    return value


def _iterations(value: object) -> object:
    if isinstance(value, str):
        first, dash, end = value.partition("-")
        if not (dash and first.strip().isdecimal() and end.strip().isdecimal() and int(first) < int(end)):
            raise ValueError("no range of iterations")
    return value


def _file_path(*suffixes: str) -> BeforeValidator:
    """Accepts the path of a file with one of `suffixes`, as text or as a path object, and None."""

    def check(value: object) -> object:
        path = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(path, str) and ("\0" in path or PurePath(path).suffix.lower() not in suffixes):
            raise ValueError("no such path")
        return path

    return BeforeValidator(check)


_Switch: TypeAlias = Annotated[bool, _Expected("true or false")]
_Count: TypeAlias = Annotated[int, Field(ge=0), _Expected("an integer of at least 0")]
_Positive: TypeAlias = Annotated[int, Field(ge=1), _Expected("an integer of at least 1")]
_Windows: TypeAlias = Annotated[int, Field(ge=1, le=1024), _Expected("an integer from 1 to 1024")]
_OptionalPositive: TypeAlias = Annotated[
    int | None, Field(ge=1), _Expected("an integer of at least 1, or null")
]
_Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1), _Expected("a number from 0 to 1")]
_Duration: TypeAlias = Annotated[float, Field(gt=0), _Expected("a number above 0")]
_OptionalAmount: TypeAlias = Annotated[float | None, Field(gt=0), _Expected("a number above 0, or null")]
_Name: TypeAlias = Annotated[str, Field(min_length=1), _Expected("a name")]
_MapPath: TypeAlias = Annotated[
    str | None,
    _file_path(*FORMAT_OF_SUFFIX),
    _Expected(f"the path of a {' or '.join(FORMAT_OF_SUFFIX)} file, or null"),
]
_TracePath: TypeAlias = Annotated[
    str | None, _file_path(".safetensors"), _Expected("the path of a .safetensors file, or null")
]
_COST_SUFFIXES = (".json", ".npy", ".safetensors")
_CostPath: TypeAlias = Annotated[
    str | None,
    _file_path(*_COST_SUFFIXES),
    _Expected(f"the path of a {', '.join(_COST_SUFFIXES[:-1])} or {_COST_SUFFIXES[-1]} file, or null"),
]
_TraceRange: TypeAlias = Annotated[
    str | None,
    BeforeValidator(_iterations),
    _Expected("iterations as 'first-end' with first < end, like '100-200', or null"),
]
_PolicyType: TypeAlias = Annotated[
    int | str,
    BeforeValidator(_policy),
    _Expected(
        "the name of an algorithm, or 0 to 3 for " + ", ".join(_ALGORITHM_OF_NUMBER),
    ),
]
_Transport: TypeAlias = Annotated[
    Literal["auto", "host", "collective", "nixl"],
    _Expected("one of 'auto', 'host', 'collective', 'nixl'"),
]
_Options: TypeAlias = Annotated[dict[str, object], _Expected("an object of options and values")]
_PhaseName: TypeAlias = Annotated[
    Literal["all", "prefill", "decode"], _Expected("one of 'all', 'prefill', 'decode'")
]


_Survival: TypeAlias = Annotated[Literal["none", "rank", "node"], _Expected("one of 'none', 'rank', 'node'")]


class EplbConfig(BaseModel):
    """The keys of `eplb_config`, immutable. Raises ConfigError for an unknown key and for a wrong value.

    Types are strict: "600" and true are no integers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dynamic_eplb: _Switch = Field(
        default=False, description="Observe the expert load and rearrange experts while serving."
    )
    expert_map_path: _MapPath = Field(
        default=None,
        description="Expert map to serve with: fixed, or what dynamic_eplb starts from. "
        "The redundancy is what the file says.",
    )
    expert_map_record_path: _MapPath = Field(
        default=None,
        description="Where to write the expert map at the end of every cycle: with dynamic_eplb the one "
        "in use, without it one planned for a fresh start on the load of all cycles, and no expert moves.",
    )
    expert_heat_collection_interval: _Positive = Field(
        default=600, description="Steps over which the expert load is collected before each plan."
    )
    algorithm_execution_interval: _Count = Field(
        default=50,
        description="Steps after a collection before the first layer of its plan may be committed.",
    )
    num_redundant_experts: _Count = Field(
        default=0, description="Physical experts beyond one for each logical expert, summed over all ranks."
    )
    eplb_policy_type: _PolicyType = Field(
        default="adaptive",
        description="The algorithm that plans: a name, or a number: "
        + ", ".join(f"{number} {name}" for number, name in enumerate(_ALGORITHM_OF_NUMBER))
        + ".",
    )
    load_collection_phase: _PhaseName = Field(
        default="all",
        description="Which steps count as expert load. Also read as eplb_heat_collection_stage.",
    )
    load_windows: _Windows = Field(
        default=16,
        description="Windows into which a collection is split, so that a plan sees how the load varies; "
        "at most one for each step.",
    )
    layer_updates_per_step: _Positive = Field(
        default=1, description="Layers that are transferred and committed together, in one step."
    )
    min_balancedness: _Fraction = Field(
        default=1.0,
        description="A layer whose balancedness is at least this is not rearranged.",
    )
    max_moved_experts_per_layer: _OptionalPositive = Field(
        default=None, description="Experts that one rearrangement may move in a layer; null: no limit."
    )
    survive: _Survival = Field(
        default="none",
        description="rank or node: place every expert so that it keeps a replica after the loss of any one; "
        "none: by load alone.",
    )
    weighted_dispatch: _Switch = Field(
        default=False,
        description="Give each replica the share of its expert's tokens that levels the ranks, through "
        "repeated entries of the routing tables; false: evenly, unless the algorithm asks for it.",
    )
    staging_memory_mb: _OptionalAmount = Field(
        default=None,
        description="Megabytes per rank for weights in flight, allocated at start; "
        "null: what layer_updates_per_step needs.",
    )
    transfer_timeout_s: _Duration = Field(
        default=30.0, description="Seconds after which a plan, a transfer or an agreement is given up."
    )
    commit_margin_steps: _Positive = Field(
        default=4, description="Steps that a rank allows itself to reach the common step of a commit."
    )
    verify_transfers: _Switch = Field(
        default=False, description="Compare checksums of the weights before a commit."
    )
    check_expert_tensors: _Switch = Field(
        default=True,
        description="Do not start where a tensor of an expert would stay while it moves; false: a warning "
        "only, for those who know that it is no expert's.",
    )
    enable_expert_compute_profiling: _Switch = Field(
        default=False,
        description="Measure each expert's compute time and plan with it, whatever the algorithm; only "
        "observed without dynamic_eplb or expert_map_record_path.",
    )
    compute_cost_alpha: _Fraction = Field(
        default=0.5,
        description="Share of the measured compute cost in the load: 0 levels the ranks' tokens, 1 their "
        "time, what lies between neither quite.",
    )
    expert_compute_profiling_warmup_steps: _Count = Field(
        default=10, description="Steps before the first measurement of compute time."
    )
    expert_compute_profiling_interval: _Positive = Field(
        default=1, description="Steps from one measurement of compute time to the next."
    )
    compute_cost_record_path: _CostPath = Field(
        default=None,
        description="Where to write each expert's measured time of a token, at the end of every collection; "
        "eplb plan --compute-cost reads it.",
    )
    trace_record_path: _TracePath = Field(
        default=None,
        description="Where to write the load trace: the expert load of every step. Until the end the newest "
        "steps are in PATH.partial.",
    )
    trace_record_range: _TraceRange = Field(
        default=None,
        description="The iterations in the load trace, counted from 0: '100-200' is 100 up to and "
        "without 200; null: all.",
    )
    log_balancedness: _Switch = Field(default=False, description="Log the balancedness of the ranks.")
    log_balancedness_interval: _Positive = Field(
        default=600, description="Steps from one line of log_balancedness to the next."
    )
    backend: _Name = Field(
        default="auto", description="Name of the device backend; auto takes the first usable."
    )
    transport: _Transport = Field(
        default="auto",
        description="How weights move between devices: host, through pinned memory and gloo; collective, by "
        "NCCL or HCCL, enqueued by the forward thread; nixl, by NIXL. auto leaves it to the backend.",
    )
    backend_options: _Options = Field(
        default={},
        description="Further options of the backend, such as pinned_bytes, hccl_options or nccl_options.",
    )

    if not TYPE_CHECKING:  # for a type checker the fields are the signature

        def __init__(self, **values: object) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(_one_line(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _merge_synonyms(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        merged = dict(values)
        for synonym, key in _SYNONYMS.items():
            if synonym in merged:
                value = merged.pop(synonym)
                if key in merged and merged[key] != value:
                    given = f"{key} is {_shown(merged[key])} and {synonym} is {_shown(value)}"
                    raise ValueError(f"{given}, expected one of them")
                merged[key] = value
        return merged

    def digest(self) -> str:
        """32 hexadecimal digits, the same for configurations that ranks may balance with together.

        Where a rank keeps its files is its own business; whether it keeps them is not.
        """
        said = self.model_dump(mode="json")
        shared = {key: value is not None if key.endswith("_path") else value for key, value in said.items()}
        return blake2b(json.dumps(shared, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def algorithm(self) -> str:
        """The name of the algorithm that `eplb_policy_type` asks for."""
        policy = self.eplb_policy_type
        return policy.strip() if isinstance(policy, str) else _ALGORITHM_OF_NUMBER[policy]

    @property
    def eplb_heat_collection_stage(self) -> str:
        """vllm-ascend's name of `load_collection_phase`."""
        return self.load_collection_phase

    @property
    def trace_range(self) -> range | None:
        """The passes that the load trace is to have, by number from 0; None for all."""
        if self.trace_record_range is None:
            return None
        first, _, end = self.trace_record_range.partition("-")
        return range(int(first), int(end))

    @property
    def num_load_windows(self) -> int:
        """`load_windows`, at most one for each step of a collection."""
        return min(self.load_windows, self.expert_heat_collection_interval)

    @property
    def moves_experts(self) -> bool:
        """Whether experts are rearranged while serving."""
        return self.dynamic_eplb

    @property
    def records_map(self) -> bool:
        """Whether an expert map is written at the end of every cycle."""
        return self.expert_map_record_path is not None

    @property
    def observes(self) -> bool:
        """Whether the expert load is collected at all."""
        return (
            self.dynamic_eplb
            or self.records_map
            or self.trace_record_path is not None
            or self.compute_cost_record_path is not None
            or self.log_balancedness
        )

    @property
    def mode(self) -> Mode:
        """The most that is asked for; a dynamic run may record too, and both may start from a static map."""
        if self.moves_experts:
            return Mode.DYNAMIC
        if self.records_map:
            return Mode.RECORD
        return Mode.OFF if self.expert_map_path is None else Mode.STATIC

    @staticmethod
    def keys_in(additional_config: Mapping[str, object]) -> list[str]:
        """The keys of `additional_config` that are read here: `eplb_config`, and ours beside it."""
        ours = _ours_at_top_level(additional_config)
        return [key for key in additional_config if key == SECTION or key in ours]

    @property
    def backend_arguments(self) -> Mapping[str, object]:
        """What `load_backend` is to hand to the backend; a backend without transports is asked for none."""
        asked = {} if self.transport == "auto" else {"transport": self.transport}
        return {**self.backend_options, **asked}

    @classmethod
    def from_additional_config(
        cls,
        additional_config: Mapping[str, object] | None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> EplbConfig:
        """The configuration in `additional_config["eplb_config"]`, with former names and environment.

        additional_config: vLLM's dictionary of that name; keys of others in it are left alone
        environ: the environment variables, by default the process's

        Keys beside `eplb_config` and names of the first release are read with a DeprecationWarning.
        DYNAMIC_EPLB=true stands in for `dynamic_eplb` where the configuration asks for nothing; the value
        false of DYNAMIC_EPLB or EXPERT_MAP_RECORD switches that part off, with a warning.
        TensorRT-LLM's EXPERT_STATISTIC_PATH, a folder, and EXPERT_STATISTIC_ITER_RANGE stand in for
        `trace_record_path` and `trace_record_range`.
        """
        additional_config = {} if additional_config is None else additional_config
        values: dict[str, object] = {}
        _read_into(values, SECTION, _section(additional_config))
        _read_into(values, "additional_config", _ours_at_top_level(additional_config))
        _apply_environment(values, os.environ if environ is None else environ)
        return cls(**values)  # type: ignore[arg-type]  # checked by the fields, which is the point


def _section(additional_config: Mapping[str, object]) -> dict[str, object]:
    """What is written under `eplb_config`."""
    if not isinstance(additional_config, Mapping):
        raise ConfigError(f"additional_config: {_shown(additional_config)}, expected an object")
    for key in additional_config:
        if key != SECTION and _nearest(key, [SECTION], cutoff=0.8):
            raise ConfigError(f"additional_config.{_printable(key)}: unknown key, did you mean {SECTION!r}?")
    section = additional_config.get(SECTION)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION}: {_shown(section)}, expected an object of keys and values")
    for key in section:
        if not isinstance(key, str):
            raise ConfigError(f"{SECTION}: the key {_shown(key)}, expected text")
    return dict(section)


def _ours_at_top_level(additional_config: Mapping[str, object]) -> dict[str, object]:
    """The keys of ours that stand beside `eplb_config`, as they did in the first release."""
    ours = (_known_keys() | _FORMER_NAMES.keys() | {_WITHOUT_EFFECT}) - _NEVER_AT_TOP_LEVEL
    return {key: value for key, value in additional_config.items() if key in ours}


def _read_into(values: dict[str, object], place: str, given: Mapping[str, object]) -> None:
    """Add what is `given` at `place` to `values`, under current names."""
    # Former names last, so that a contradiction is reported at the name that should go.
    for key in sorted(given, key=lambda name: name in _FORMER_NAMES):
        current = _FORMER_NAMES.get(key, key)
        if key == _WITHOUT_EFFECT:
            _warn(f"{place}.{key} is deprecated and has no effect", DeprecationWarning)
            continue
        if current != key or place != SECTION:
            _warn(f"{place}.{key} is deprecated, write {SECTION}.{current}", DeprecationWarning)
        _put(values, current, given[key], given_as=f"{place}.{key}")


def _put(values: dict[str, object], key: str, value: object, *, given_as: str) -> None:
    """Set a key that may be set already, to the same value."""
    if key not in values:
        values[key] = value
    elif values[key] != value:
        raise ConfigError(
            f"{given_as}: {_shown(value)}, but {SECTION}.{key} is {_shown(values[key])}; keep one of them"
        )


def _apply_environment(values: dict[str, object], environ: Mapping[str, str]) -> None:
    dynamic = _switch(environ, "DYNAMIC_EPLB")
    asks_for_something = values.keys() & {"dynamic_eplb", "expert_map_path", "expert_map_record_path"}
    if dynamic and not asks_for_something:
        values["dynamic_eplb"] = True
    if dynamic is False and values.get("dynamic_eplb") is True:
        _warn(f"DYNAMIC_EPLB is false: {SECTION}.dynamic_eplb is ignored", UserWarning)
        values["dynamic_eplb"] = False
    record = _switch(environ, "EXPERT_MAP_RECORD")
    if record is False and values.get("expert_map_record_path") is not None:
        _warn(f"EXPERT_MAP_RECORD is false: {SECTION}.expert_map_record_path is ignored", UserWarning)
        values["expert_map_record_path"] = None
    _apply_statistic_environment(values, environ)


def _apply_statistic_environment(values: dict[str, object], environ: Mapping[str, str]) -> None:
    folder, iterations = (environ.get(name, "").strip() for name in (_STATISTIC_PATH, _STATISTIC_RANGE))
    if iterations:
        try:
            _iterations(iterations)
        except ValueError:
            raise ConfigError(
                f"environment variable {_STATISTIC_RANGE}: {_shown(environ[_STATISTIC_RANGE])}, "
                f"expected {_expected('trace_record_range')}"
            ) from None
        values.setdefault("trace_record_range", iterations)
    if folder or iterations:
        trace = PurePath(folder or _STATISTIC_FOLDER) / "expert_load.safetensors"
        values.setdefault("trace_record_path", str(trace))


def _switch(environ: Mapping[str, str], name: str) -> bool | None:
    """The value of an environment variable that is true or false, None when it is not set or empty."""
    text = environ.get(name, "").strip().lower()
    if text in ("", "true", "1", "false", "0"):
        return text in ("true", "1") if text else None
    raise ConfigError(f"environment variable {name}: {_shown(environ[name])}, expected true or false")


def _known_keys() -> set[str]:
    return set(EplbConfig.model_fields) | set(_SYNONYMS)


def _one_line(error: ValidationError) -> str:
    """What a user needs of pydantic's report, each key once."""
    faults: dict[str, str] = {}
    for details in error.errors(include_url=False):
        if not details["loc"]:
            return f"{SECTION}: {details['ctx']['error']}"
        key = str(details["loc"][0])
        if details["type"] == "extra_forbidden":
            faults[key] = _unknown_key(key)
        else:
            faults[key] = f"{_shown(details['input'])}, expected {_expected(key)}"
    return "; ".join(f"{SECTION}.{_printable(key)}: {fault}" for key, fault in faults.items())


def _unknown_key(key: str) -> str:
    former = _FORMER_NAMES.get(key)
    nearest = former or _nearest(key, sorted(_known_keys()), cutoff=0.6)
    if nearest:
        return f"unknown key, did you mean {nearest!r}?"
    return f"unknown key, the known ones are {', '.join(EplbConfig.model_fields)}"


def _nearest(key: object, known: list[str], *, cutoff: float) -> str | None:
    written = str(key).lower().replace("-", "_")
    return next(iter(get_close_matches(written, known, n=1, cutoff=cutoff)), None)


def _expected(key: str) -> str:
    field = EplbConfig.model_fields[key]
    return next(item.text for item in field.metadata if isinstance(item, _Expected))


def _printable(key: object) -> str:
    text = str(key)
    return text if text.isprintable() and len(text) <= 80 else _shown(text)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _warn(message: str, category: type[Warning]) -> None:
    warnings.warn(message, category, stacklevel=4)
