"""`eplb_config` in the processes of vLLM: checked and translated in the front end, read again in workers.

Whatever is wrong is a ConfigError of one line before vLLM builds anything, or right after it knows the model.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from eplb_platform.config import SECTION, ConfigError, EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm import deployed_map, launch_checks, output_files
from eplb_platform.integrations.vllm.compatibility import expect
from eplb_platform.integrations.vllm.device_platform import DevicePlatform
from eplb_platform.integrations.vllm.model_layers import moe_layers

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

HANDED_OVER = "EPLB_PLATFORM_CONFIG"
"""The environment variable with the keys, as JSON, where the platform refuses them in additional_config."""

MAX_REDUNDANT_EXPERTS = 1023
"""More than that do not fit vLLM's tables."""

BAD_CONFIGURATION = 2
"""The exit code of a server that was given a configuration that cannot be used."""

# vLLM's own window is not read: it is as small as it can be. Nobody else asks for that.
_WINDOW_SIZE = 1
# As in vLLM's log, whose level and form it takes.
_logger = logging.getLogger("vllm.eplb_platform")


expect(
    "vllm.engine.arg_utils:EngineArgs",
    "additional_config",
    "data_parallel_size",
    "enable_elastic_ep",
    "enable_eplb",
    "enable_expert_parallel",
    "eplb_config",
    "prefill_context_parallel_size",
    "tensor_parallel_size",
)
expect("vllm.engine.arg_utils:EngineArgs.create_model_config", "self")
expect(
    "vllm.config:EPLBConfig",
    "communicator",
    "log_balancedness",
    "log_balancedness_interval",
    "num_redundant_experts",
    "step_interval",
    "use_async",
    "window_size",
)
expect("vllm.config:ModelConfig.get_num_experts", "self")


@dataclass(frozen=True)
class ServingConfig:
    """What the front end found out.

    num_redundant_experts: what the map says, if there is one
    expert_map: the map to serve with, of all pipeline stages
    """

    eplb: EplbConfig
    num_redundant_experts: int
    expert_map: ExpertMap | None = None


def requested(engine_args: EngineArgs, platform: DevicePlatform | None = None) -> ServingConfig | None:
    """What `additional_config` asks for, checked against everything that is known before the model is.

    platform: by default vLLM's

    None when there is nothing to do: no key of ours, or keys that ask for nothing, or a platform that
    balances by itself. Raises ConfigError.
    """
    given = engine_args.additional_config
    if not isinstance(given, Mapping):
        return None  # empty, or an object of somebody else's
    asks_vllm = platform is None
    if EplbConfig.keys_in(given):
        platform = platform or DevicePlatform.current()
        if platform.balances_by_itself:
            _say_who_balances()
            return None
    config = _read(given)
    if platform is None or not _asks_for_something(config):
        return None
    if asks_vllm:
        launch_checks.check_vllm()
    launch_checks.check_flags(engine_args, platform)
    launch_checks.check_algorithm(config)
    launch_checks.check_backend(config, platform)
    expert_map = launch_checks.read_map(config, launch_checks.ep_size_of(engine_args))
    output_files.check_distinct(config)
    if _is_first_node(engine_args):
        output_files.check_writable(config)
    redundant = config.num_redundant_experts if expert_map is None else expert_map.num_redundant_experts
    if redundant > MAX_REDUNDANT_EXPERTS:
        raise ConfigError(
            f"{SECTION}.num_redundant_experts: {redundant}, "
            f"expected at most {MAX_REDUNDANT_EXPERTS}, which is what vLLM's tables hold"
        )
    return ServingConfig(config, redundant, expert_map)


@contextmanager
def applied(
    engine_args: EngineArgs, serving: ServingConfig, platform: DevicePlatform | None = None
) -> Iterator[None]:
    """vLLM's flags, set to what was requested while vLLM builds its configuration from them.

    The model is checked as soon as vLLM knows it: of a dense one vLLM itself would complain, at length.
    """
    from vllm.config import EPLBConfig

    platform = platform or DevicePlatform.current()
    config = serving.eplb
    before = (engine_args.enable_eplb, engine_args.eplb_config, engine_args.additional_config)
    engine_args.enable_eplb = True
    engine_args.eplb_config = EPLBConfig(
        num_redundant_experts=serving.num_redundant_experts,
        window_size=_WINDOW_SIZE,
        step_interval=config.expert_heat_collection_interval,
        log_balancedness=config.log_balancedness,
        log_balancedness_interval=config.log_balancedness_interval,
        use_async=False,
        communicator=platform.communicator,
    )
    handing_over = _handed_over(engine_args, config) if platform.refuses_our_keys else nullcontext()
    try:
        with handing_over, _model_checked(engine_args, serving):
            yield
    finally:
        engine_args.enable_eplb, engine_args.eplb_config, engine_args.additional_config = before


def check_built(vllm_config: VllmConfig, serving: ServingConfig) -> None:
    """Raise ConfigError when the model that vLLM found cannot be balanced as requested."""
    _check_model(vllm_config.model_config, _ep_size(vllm_config.parallel_config), serving)


def of_worker(vllm_config: VllmConfig) -> EplbConfig | None:
    """The configuration that the front end accepted, in any process that has vLLM's; None without one."""
    parallel_config = vllm_config.parallel_config
    if not parallel_config.enable_eplb or parallel_config.eplb_config.window_size != _WINDOW_SIZE:
        return None
    additional_config = vllm_config.additional_config
    given: Mapping[str, object] = additional_config if isinstance(additional_config, Mapping) else {}
    if EplbConfig.keys_in(given):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the front end has shown them
            return EplbConfig.from_additional_config(given)
    handed_over = os.environ.get(HANDED_OVER)
    return EplbConfig(**json.loads(handed_over)) if handed_over else None


def fail(error: ConfigError, usage_context: object) -> NoReturn:
    """End a server with one line on standard error and exit code 2; elsewhere raise `error`.

    usage_context: vLLM's UsageContext, None when it was not given
    """
    if getattr(usage_context, "name", None) != "OPENAI_API_SERVER":
        raise error
    print("eplb_platform:", *str(error).split(), file=sys.stderr, flush=True)
    raise SystemExit(BAD_CONFIGURATION)


# --- before vLLM's configuration is built ---


def _read(given: Mapping[str, object]) -> EplbConfig:
    """The configuration, its warnings in vLLM's log: Python would show few of them."""
    # A stray variable alone is no reason to interfere.
    environ = os.environ if EplbConfig.keys_in(given) else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = EplbConfig.from_additional_config(given, environ=environ)
    for warning in caught:
        _logger.warning("%s", warning.message)
    return config


def _asks_for_something(config: EplbConfig) -> bool:
    if config.observes or config.expert_map_path is not None:
        return True
    ignored = sorted(
        key for key in config.model_fields_set if getattr(config, key) != EplbConfig.model_fields[key].default
    )
    if ignored:
        _logger.warning(
            "%s has no effect without dynamic_eplb, expert_map_path, expert_map_record_path, "
            "trace_record_path, compute_cost_record_path or log_balancedness: %s",
            SECTION,
            ", ".join(ignored),
        )
    return False


def _is_first_node(engine_args: EngineArgs) -> bool:
    """Whether the rank that writes the records may be on this machine."""
    later = (
        getattr(engine_args, name, None)
        for name in ("node_rank", "data_parallel_rank", "data_parallel_start_rank")
    )
    return not any(later)


def _say_who_balances() -> None:
    _logger.info(
        "vllm-ascend's first model runner balances by itself, with its own reading of %s: eplb_platform "
        "steps aside. With VLLM_USE_V2_MODEL_RUNNER=1 eplb_platform balances.",
        SECTION,
    )


# --- while it is built ---


@contextmanager
def _handed_over(engine_args: EngineArgs, config: EplbConfig) -> Iterator[None]:
    """Our keys in the environment instead of `additional_config`, for the workers that will inherit it."""
    given = engine_args.additional_config
    ours = EplbConfig.keys_in(given)
    os.environ[HANDED_OVER] = config.model_dump_json(exclude_unset=True)
    engine_args.additional_config = {key: value for key, value in given.items() if key not in ours}
    # They are in the configuration by now; the platform takes them for its first runner's.
    switches = {name: os.environ.pop(name, None) for name in ("DYNAMIC_EPLB", "EXPERT_MAP_RECORD")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in switches.items() if value is not None})


@contextmanager
def _model_checked(engine_args: EngineArgs, serving: ServingConfig) -> Iterator[None]:
    """Have these arguments check the model that they find before they go on."""
    create = engine_args.create_model_config

    def create_model_config() -> ModelConfig:
        model_config = create()
        _check_model(model_config, launch_checks.ep_size_of(engine_args), serving)
        return model_config

    # Of this one object: the class stays as it is.
    vars(engine_args)["create_model_config"] = create_model_config
    try:
        yield
    finally:
        del vars(engine_args)["create_model_config"]


# --- when the model is known ---


def _check_model(model_config: ModelConfig, ep_size: int, serving: ServingConfig) -> None:
    num_experts = int(model_config.get_num_experts() or 0)
    if num_experts < 1:
        raise ConfigError(f"{SECTION}: the model {model_config.model!r} has no experts to balance")
    if serving.expert_map is None:
        _check_divisible(num_experts, serving.num_redundant_experts, ep_size)
        return
    layers = moe_layers(model_config.hf_text_config)
    path = str(serving.eplb.expert_map_path)
    deployed_map.check_ranks(serving.expert_map, ep_size, path)
    deployed_map.check_model(serving.expert_map, num_experts, None if layers is None else len(layers), path)


def _ep_size(parallel_config: object) -> int:
    sizes = ("tensor_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
    ep_size = 1
    for name in sizes:
        ep_size *= int(getattr(parallel_config, name))
    return ep_size


def _check_divisible(num_experts: int, num_redundant_experts: int, ep_size: int) -> None:
    left_over = (num_experts + num_redundant_experts) % ep_size
    if not left_over:
        return
    fitting = [num_redundant_experts - left_over, num_redundant_experts - left_over + ep_size]
    nearest = " or ".join(str(number) for number in fitting if 0 <= number <= MAX_REDUNDANT_EXPERTS)
    raise ConfigError(
        f"{SECTION}.num_redundant_experts: {num_redundant_experts}, but {num_experts} experts and "
        f"{num_redundant_experts} redundant ones cannot be shared evenly by {ep_size} ranks, "
        f"the nearest that can: {nearest}"
    )
