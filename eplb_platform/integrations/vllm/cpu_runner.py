"""vLLM's CPU model runner, with the EPLB state that the runner for accelerators builds.

Only loading is missing on CPUs: `prepare_forward` before a pass and `eplb_step` after it, dummy and profile
passes included, are inherited. (vLLM's second model runner, which needs Triton, builds the state itself.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.distributed.eplb.eplb_state import EplbState
from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu.eplb_utils import draft_model_supports_eplb, eplb_draft_model_name

from eplb_platform.integrations.vllm.compatibility import replace


def install() -> None:
    """Let `CPUModelRunner.load_model` build the EPLB state. Idempotent."""
    replace(CPUModelRunner, "load_model", _with_eplb_state)


def _with_eplb_state(load_model: Callable[..., None]) -> Callable[..., None]:
    def load_model_and_eplb_state(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        if self.parallel_config.enable_eplb and self.eplb_state is None:
            build_eplb_state(self)

    return load_model_and_eplb_state


def build_eplb_state(runner: Any) -> None:
    """Give a runner with loaded weights its `eplb_state`: the draft model's experts first, as vLLM has it.

    Raises ValueError if the model has no experts that vLLM could move.
    """
    runner._moe_model = get_mixture_of_experts_model(runner.model)
    if runner._moe_model is None:
        raise ValueError(
            f"{type(runner.model).__name__} has no experts that vLLM can move: serve it without EPLB"
        )
    state = EplbState(runner.parallel_config, runner.device)
    runner.eplb_state = state
    _add_draft_model(runner, state)
    state.add_model(runner._moe_model, runner.model_config)
    if state.is_async:
        state.start_async_loop()


def _add_draft_model(runner: Any, state: EplbState) -> None:
    drafter, speculative = getattr(runner, "drafter", None), runner.speculative_config
    if drafter is None or speculative is None or not hasattr(drafter, "model"):
        return
    draft_model = get_mixture_of_experts_model(drafter.model)
    if draft_model_supports_eplb(speculative, draft_model):
        config = speculative.draft_model_config
        state.add_model(draft_model, config, model_name=eplb_draft_model_name(config))
        drafter.set_eplb_state(state)
