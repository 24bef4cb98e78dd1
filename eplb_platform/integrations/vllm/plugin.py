"""Where the plugin takes hold of vLLM: the front end's configuration and every worker's birth.

Both places are wrapped once their modules are imported, so that a process that has no use for them (vLLM
inspects models in one) pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from eplb_platform.integrations.vllm.compatibility import replace
from eplb_platform.integrations.vllm.import_hook import when_imported

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_is_installed = False


def install() -> None:
    """Wrap both places; a second call does nothing."""
    global _is_installed
    if not _is_installed:
        _is_installed = True
        when_imported("vllm.engine.arg_utils", _wrap_front_end)
        when_imported("vllm.v1.worker.worker_base", _wrap_workers)


def _wrap_front_end(arg_utils: ModuleType) -> None:
    replace(arg_utils.EngineArgs, "create_engine_config", _with_eplb_config)


def _wrap_workers(worker_base: ModuleType) -> None:
    replace(worker_base.WorkerBase, "__init__", _with_balancing)


def _with_eplb_config(create: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    """`eplb_config` becomes flags of vLLM for as long as vLLM builds its own configuration."""

    def create_engine_config(
        self: EngineArgs, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> VllmConfig:
        if not self.additional_config:
            return create(self, usage_context, *args, **kwargs)
        from eplb_platform.config import ConfigError
        from eplb_platform.integrations.vllm import configuration, cpu_platform, metrics

        try:
            serving = configuration.requested(self)
            if serving is None:
                return create(self, usage_context, *args, **kwargs)
            cpu_platform.admit_eplb()
            with configuration.applied(self, serving):
                vllm_config = create(self, usage_context, *args, **kwargs)
            configuration.check_built(vllm_config, serving)
        except ConfigError as error:
            configuration.fail(error, usage_context)
        metrics.prepare_front_end()
        return vllm_config

    return create_engine_config


def _with_balancing(initialise: Callable[..., None]) -> Callable[..., None]:
    """A worker whose engine asked for balancing gets it; others stay as they are."""

    def __init__(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        initialise(self, vllm_config, *args, **kwargs)
        # Not additional_config: on Ascend our keys are not in it.
        if not vllm_config.parallel_config.enable_eplb:
            return
        from eplb_platform.integrations.vllm import configuration

        config = configuration.of_worker(vllm_config)
        if config is not None:
            from eplb_platform.integrations.vllm.worker import equip

            equip(self, vllm_config, config)

    return __init__
