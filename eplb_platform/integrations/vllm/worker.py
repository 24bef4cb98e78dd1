"""What a vLLM worker gets: its own device's hooks, the calls of `collective_rpc`, and a careful end."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from eplb_platform.heat import Phase
from eplb_platform.integrations.vllm import compatibility, cpu_platform, eplb_state, metrics
from eplb_platform.integrations.vllm.balancing import EngineBalancing, WeightUpdateRefused
from eplb_platform.integrations.vllm.expert_parallel_group import ExpertParallelGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from eplb_platform.config import EplbConfig

logger = logging.getLogger(__name__)


def equip(worker: Any, vllm_config: VllmConfig, config: EplbConfig) -> None:
    """Give a worker of an engine with `eplb_config` what balancing needs; called at its birth.

    Raises `UnsupportedVllm` on a vLLM that lacks what the integration wraps.
    """
    _log_as_vllm_does()
    compatibility.check_vllm()
    cpu_platform.admit_eplb()
    cpu_platform.equip_worker()
    eplb_state.take_over()
    WorkerHooks(worker, vllm_config, config).install()


class WorkerHooks:
    """Wraps the methods of one worker object; the class and other engines' workers stay as they are."""

    def __init__(self, worker: Any, vllm_config: VllmConfig, config: EplbConfig) -> None:
        self._worker = worker
        self._vllm_config = vllm_config
        self._config = config
        self._balancing: EngineBalancing | None = None
        self._publisher: metrics.SnapshotPublisher | None = None
        self._is_paused = False
        self._steps_before: int | None = None

    def install(self) -> None:
        """Add the remote calls and wrap what the engine calls."""
        for name, call in {
            "eplb_snapshot": self.snapshot,
            "eplb_pause": self.pause,
            "eplb_resume": self.resume,
            "eplb_rebalance_now": self.rebalance_now,
            "eplb_start_profiling": self.start_profiling,
            "eplb_stop_profiling": self.stop_profiling,
            "eplb_compute_statistics": self.compute_statistics,
        }.items():
            setattr(self._worker, name, call)
        for name, wrapper in {
            "load_model": self._load_model,
            "execute_model": self._execute_model,
            "sample_tokens": self._sample_tokens,
            "sleep": self._sleep,
            "wake_up": self._wake_up,
            "reload_weights": self._reload_weights,
            "start_weight_update": self._start_weight_update,
            "shutdown": self._shutdown,
        }.items():
            original = getattr(self._worker, name, None)
            if original is not None:
                setattr(self._worker, name, functools.wraps(original)(functools.partial(wrapper, original)))

    # --- remote calls ---

    def snapshot(self) -> Mapping[str, object]:
        """What balancing did on this rank, as plain data."""
        return self._loaded().snapshot()

    def pause(self) -> None:
        """Move nothing until `eplb_resume`."""
        self._is_paused = True
        self._loaded().pause()

    def resume(self) -> None:
        """Go on after `eplb_pause`."""
        self._is_paused = False
        self._loaded().resume()

    def rebalance_now(self) -> None:
        """Start a cycle at the next forward pass."""
        self._loaded().rebalance_now()

    def start_profiling(self) -> None:
        """Measure compute time from the next forward pass on."""
        self._loaded().start_profiling()

    def stop_profiling(self) -> None:
        """Measure no more; plans go on with what was measured."""
        self._loaded().stop_profiling()

    def compute_statistics(self) -> Mapping[str, object]:
        """What experts cost over all ranks, by model, in the layout of SGLang's documentation."""
        return self._loaded().compute_statistics()

    # --- the engine's calls ---

    def _load_model(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._balancing = EngineBalancing(
            self._vllm_config, self._config, ExpertParallelGroup.join(self._vllm_config)
        )
        with eplb_state.driven_by(self._balancing):
            original(*args, **kwargs)
        self._balancing.end_of_loading()
        folder = metrics.state_folder()
        if folder is not None:
            place = self._balancing.status()
            name = f"stage-{place['stage']}-rank-{place['rank']}"
            self._publisher = metrics.SnapshotPublisher(folder, name, self._balancing.status)
            self._publisher.start()

    def _execute_model(
        self, original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        balancing = self._loaded()
        if scheduler_output.total_num_scheduled_tokens > 0:
            balancing.phase = phase_of(scheduler_output)
            self._steps_before = balancing.steps
        output = original(scheduler_output, *args, **kwargs)
        if output is not None:
            self._count_the_pass(balancing)
        return output

    def _sample_tokens(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        self._count_the_pass(self._loaded())
        return output

    def _count_the_pass(self, balancing: EngineBalancing) -> None:
        """vLLM's runner steps at the end of sampling: not in a pipeline stage before the last, nor for a
        pooling model.
        """
        if self._steps_before is not None and balancing.steps == self._steps_before:
            balancing.step(is_dummy=False)
        self._steps_before = None

    def _sleep(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Nothing may move while weights leave the device."""
        balancing = self._loaded()
        balancing.pause()
        balancing.drain()
        original(*args, **kwargs)

    def _wake_up(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        if not self._is_paused:
            self._loaded().resume()

    def _reload_weights(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        balancing = self._loaded()
        try:
            refuse_on_cpu("reload_weights")
            if args or kwargs.get("weights_iterator") is not None:
                balancing.refuse_unless_initial("reload_weights with some of the weights")
            else:
                balancing.return_to_initial_layout("reload_weights")
        except WeightUpdateRefused as refusal:
            self._refuse(refusal)
        else:
            original(*args, **kwargs)

    def _start_weight_update(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        balancing = self._loaded()
        try:
            refuse_on_cpu("a weight update")
            balancing.pause()
            balancing.drain()
            balancing.refuse_unless_initial("a weight update")
        except WeightUpdateRefused as refusal:
            self._refuse(refusal)
        else:
            original(*args, **kwargs)

    def _refuse(self, refusal: WeightUpdateRefused) -> None:
        """Let the engine's last worker speak for all, which refuse alike: vLLM reads the answers in order,
        and leaves those after a failed one in their queues, to be taken for answers to the next call.
        """
        if self._worker.rank == self._vllm_config.parallel_config.world_size - 1:
            raise refusal

    def _shutdown(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self._publisher is not None:
            self._publisher.close()
        if self._balancing is not None:
            self._balancing.close()
        original(*args, **kwargs)

    def _loaded(self) -> EngineBalancing:
        if self._balancing is None:
            raise RuntimeError("the model is not loaded yet")
        return self._balancing


def refuse_on_cpu(what: str) -> None:
    """Raise `WeightUpdateRefused` where vLLM itself, balanced or not, spoils a model that it loads twice: its
    layers on CPUs keep repacked weights, which a second load does not renew.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        raise WeightUpdateRefused(
            f"{what}: vLLM's layers on CPUs repack their weights and take no others; start the engine anew"
        )


def phase_of(scheduler_output: Any) -> Phase:
    """What a pass computes: a request that gets one token, and its drafted ones, is decoding."""
    drafted = scheduler_output.scheduled_spec_decode_tokens
    is_decoding = [
        count <= 1 + len(drafted.get(request, ()))
        for request, count in scheduler_output.num_scheduled_tokens.items()
    ]
    if all(is_decoding):
        return Phase.DECODE
    return Phase.MIXED if any(is_decoding) else Phase.PREFILL


def _log_as_vllm_does() -> None:
    """vLLM gives handlers to its own loggers only: ours speak through them."""
    ours, theirs = logging.getLogger("eplb_platform"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.getEffectiveLevel())
        ours.propagate = False
