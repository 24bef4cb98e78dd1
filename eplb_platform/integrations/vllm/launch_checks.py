"""What can be wrong with `eplb_config` before vLLM knows the model: a ConfigError of one line each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from eplb_platform.algorithms.algorithm import AlgorithmError
from eplb_platform.algorithms.discovery import load_algorithm
from eplb_platform.backend import BackendReport, discover_backends
from eplb_platform.config import SECTION, ConfigError, EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm import deployed_map
from eplb_platform.integrations.vllm.device_platform import DevicePlatform
from eplb_platform.records import RecordError

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


def check_vllm() -> None:
    """A vLLM that the integration does not know is a ConfigError too."""
    from eplb_platform.integrations.vllm import compatibility, eplb_state  # noqa: F401  # says what it expects

    try:
        compatibility.check_vllm()
    except compatibility.UnsupportedVllm as error:
        raise ConfigError(str(error)) from error


def check_flags(engine_args: EngineArgs, platform: DevicePlatform) -> None:
    """The engine has an expert-parallel group of constant size, and no other balancer."""
    if engine_args.enable_eplb or engine_args.eplb_config != type(engine_args.eplb_config)():
        flag = "--enable-eplb" if engine_args.enable_eplb else "--eplb-config"
        raise ConfigError(
            f"{flag}: starts vLLM's own balancer, and {SECTION} in --additional-config eplb_platform's; "
            f"leave {flag} out, or {SECTION}"
        )
    if engine_args.enable_elastic_ep:
        raise ConfigError(
            f"--enable-elastic-ep: the ranks of an engine with {SECTION} cannot change while it serves; "
            "leave one of the two out"
        )
    if not engine_args.enable_expert_parallel:
        raise ConfigError(f"{SECTION}: experts are not spread over ranks; add --enable-expert-parallel")
    if ep_size_of(engine_args) < 2:
        raise ConfigError(
            f"{SECTION}: the EP size is 1, and one rank has nothing to balance; "
            "use --tensor-parallel-size or --data-parallel-size of at least 2"
        )
    if platform.refuses_eplb:
        raise ConfigError(f"{SECTION}: vLLM's platform for {platform.device_type} supports no EPLB")


def check_algorithm(config: EplbConfig) -> None:
    """The algorithm is there and can be loaded."""
    try:
        load_algorithm(config.algorithm)
    except (ValueError, AlgorithmError) as error:
        raise ConfigError(f"{SECTION}.eplb_policy_type: {' '.join(str(error).split())}") from error


def check_backend(config: EplbConfig, platform: DevicePlatform) -> None:
    """The named backend, or the one that `auto` will find, can be used on the platform's devices.

    The workers will make it; here only its availability is asked, which touches no device.
    """
    reports = discover_backends()
    fault = (
        _fault_of_auto(reports, platform.device_type)
        if config.backend == "auto"
        else _fault_of_named(reports, config.backend, platform.device_type)
    )
    if fault is not None:
        raise ConfigError(f"{SECTION}.backend: {fault}")


def _fault_of_auto(reports: list[BackendReport], device_type: str) -> str | None:
    matching = [report.name for report in reports if report.usable and report.device_type == device_type]
    if not matching:
        return f"none is usable for {device_type!r} (installed: {_installed(reports)})"
    if len(matching) > 1:
        return f"{len(matching)} are for {device_type!r}, name one of {', '.join(matching)}"
    return None


def _fault_of_named(reports: list[BackendReport], name: str, device_type: str) -> str | None:
    named = next((report for report in reports if report.name == name), None)
    if named is None:
        return f"{name!r} is not installed (installed: {_installed(reports)})"
    if not named.usable:
        return f"{name!r} cannot be used: {named.reason}"
    if named.device_type != device_type:
        return f"{name!r} is for {named.device_type!r}, but vLLM runs on {device_type!r}"
    return None


def _installed(reports: list[BackendReport]) -> str:
    shown = (f"{report.name} for {report.device_type or '?'}: {report.reason}" for report in reports)
    return "; ".join(shown) or "none"


def read_map(config: EplbConfig, ep_size: int) -> ExpertMap | None:
    """The map of `expert_map_path`, which fits the ranks; None when none is to be deployed."""
    path = config.expert_map_path
    if path is None:
        return None
    try:
        expert_map = ExpertMap.load(path)
    except RecordError as error:
        raise ConfigError(str(error)) from error
    deployed_map.check_ranks(expert_map, ep_size, path)
    configured = config.num_redundant_experts if "num_redundant_experts" in config.model_fields_set else None
    deployed_map.check_redundancy(expert_map, configured, path)
    return expert_map


def ep_size_of(engine_args: EngineArgs) -> int:
    """The ranks of an expert-parallel group, from the arguments and, as vLLM reads it, VLLM_DP_SIZE."""
    data_parallel = engine_args.data_parallel_size
    if data_parallel <= 1:
        data_parallel = int(os.environ.get("VLLM_DP_SIZE") or 1)
    return int(engine_args.tensor_parallel_size * engine_args.prefill_context_parallel_size * data_parallel)
