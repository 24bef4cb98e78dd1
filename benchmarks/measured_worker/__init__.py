"""A vLLM worker on CPUs that times its forward passes and what EPLB takes of them, whoever balances."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from eplb_platform.integrations.vllm import cpu_platform


class HostEvent:
    """`torch.Event` for a CPU, where everything has happened when it returns."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self._recorded = 0.0

    def record(self, *arguments: object) -> None:
        self._recorded = time.perf_counter()

    def wait(self, *arguments: object) -> None:
        """Nothing is asynchronous."""

    def synchronize(self) -> None:
        """Nothing is asynchronous."""

    def elapsed_time(self, later: HostEvent) -> float:
        """Milliseconds."""
        return 1e3 * (later._recorded - self._recorded)


class MeasuredWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not where the types are checked
    """Give it to vLLM as `worker_cls`."""

    def __init__(self, vllm_config: Any, *arguments: Any, **options: Any) -> None:
        if vllm_config.parallel_config.enable_eplb and not vllm_config.additional_config:
            # What keeps vLLM's own EPLB from a CPU; ours brings it with `eplb_config`.
            cpu_platform.admit_eplb()
            cpu_platform.equip_worker()
            torch.Event = HostEvent  # type: ignore[assignment,misc]
        super().__init__(vllm_config, *arguments, **options)
        self._steps: list[dict[str, Any]] = []
        self._started = 0.0
        self._eplb_s = 0.0

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Then wrap what is timed, around everything that others have wrapped."""
        super().load_model(*arguments, **options)
        for name in ("execute_model", "sample_tokens"):
            setattr(self, name, functools.partial(self._timed, getattr(self, name)))
        self.model_runner.eplb_step = functools.partial(self._step, self.model_runner.eplb_step)

    def measured_steps(self) -> list[dict[str, Any]]:
        """Since the last call, for each pass: seconds, those of them in EPLB, load and map.

        load: [layers, physical]; arrivals: experts that came to a rank which had not had them
        """
        steps, self._steps = self._steps, []
        return steps

    def _timed(self, call: Any, *arguments: Any, **options: Any) -> Any:
        if call.__name__ == "execute_model":
            self._started = time.perf_counter()
        count = len(self._steps)
        output = call(*arguments, **options)
        if len(self._steps) > count:
            self._steps[-1]["seconds"] = time.perf_counter() - self._started
        return output

    def _step(self, call: Any, is_dummy: bool = False, is_profile: bool = False) -> None:
        if is_profile:
            call(is_dummy, is_profile)
            return
        (state,) = self.model_runner.eplb_state.model_states.values()
        load = state.expert_load_pass.clone()
        before = state.physical_to_logical_map.clone()
        started = time.perf_counter()
        call(is_dummy, is_profile)
        eplb_s = time.perf_counter() - started
        ranks = self.parallel_config.world_size
        self._steps.append(
            {
                "seconds": 0.0,
                "eplb_s": eplb_s,
                "rank_load": load.view(len(load), ranks, -1).sum(2).tolist(),
                "arrivals": arrivals(before, state.physical_to_logical_map, ranks),
            }
        )


def arrivals(before: torch.Tensor, after: torch.Tensor, ranks: int) -> int:
    """Experts of a rank that were nowhere on it before. before, after: [layers, physical]"""
    if torch.equal(before, after):
        return 0
    moved = 0
    for old, new in zip(before.view(len(before), ranks, -1), after.view(len(after), ranks, -1), strict=True):
        for held, holds in zip(old, new, strict=True):
            moved += len(set(holds.tolist()) - set(held.tolist()))
    return moved
