"""The balancers of one vLLM engine on one rank: one for each model that has experts."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eplb_platform.backend import load_backend
from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.integrations.vllm import deployed_map
from eplb_platform.integrations.vllm.load_counts import Circumstances, LoadCounts
from eplb_platform.integrations.vllm.served_model import VllmModel
from eplb_platform.integrations.vllm.stage_recording import StageMapRecorder
from eplb_platform.runtime.start import start_balancer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.eplb.eplb_state import EplbModelState

    from eplb_platform.config import EplbConfig
    from eplb_platform.integrations.vllm.expert_parallel_group import ExpertParallelGroup
    from eplb_platform.runtime.balancer import Balancer

logger = logging.getLogger(__name__)


class NothingToBalance(RuntimeError):
    """The model has no experts that could be placed."""


class WeightUpdateRefused(RuntimeError):
    """New weights cannot be loaded while experts are out of the checkpoint loader's places."""


@dataclass(frozen=True)
class _Balanced:
    """One model of the engine, with all that balances it."""

    model: VllmModel
    counts: LoadCounts
    balancer: Balancer


class EngineBalancing:
    """What vLLM's `EplbState` drives in the place of its own state machine."""

    def __init__(self, vllm_config: VllmConfig, config: EplbConfig, group: ExpertParallelGroup) -> None:
        self.config = config
        self.phase = Phase.MIXED
        """Of the pass that is running; the worker says it before the pass."""
        self.steps = 0
        self._vllm_config = vllm_config
        self._group = group
        self._balanced: list[_Balanced] = []
        self._main: _Balanced | None = None

    # --- start ---

    def add_model(self, state: EplbModelState, *, is_main: bool) -> None:
        """Start balancing a model whose weights have been loaded; every rank of the engine calls it.

        Moves the experts to the static map's places first, if there is one. Raises ValueError for a map that
        does not fit the model.
        """
        group, config = self._group, self.config if is_main else _of_draft(self.config)
        model = VllmModel(state, group.topology, num_experts_per_token=self._experts_per_token())
        if not model.can_be_routed:
            self._leave_alone(model, is_main=is_main)
            return
        device_type = state.expert_load_pass.device.type
        backend = load_backend(config.backend, device_type=device_type, **config.backend_arguments)
        model.write_through(backend)
        if group.rank == 0 and (config.moves_experts or config.expert_map_path is not None):
            model.warn_of_doubtful_tensors()
        name = f"model-{len(self._balanced)}"
        if is_main:
            group.publish_layers(model.expert_map.num_layers)
        group.wait_for_all(name)  # ranks load weights at their own pace, a collective would time out
        balancer = start_balancer(
            config,
            model,
            backend,
            group.store,
            group.rank,
            num_expert_groups=model.num_expert_groups,
            name=name,
            model_name=model.model_name,
            deploy=self._map_to_deploy(model) if is_main else None,
            recorder=self._stage_recorder() if is_main else None,
        )
        self._balanced.append(_Balanced(model, LoadCounts(state.expert_load_pass, backend), balancer))
        if is_main:
            self._main = self._balanced[-1]
        if group.rank == 0:
            logger.info(
                "%s: %d MoE layers, %d experts in %d places on %d ranks: %s, algorithm %s",
                model.model_name, model.expert_map.num_layers, model.expert_map.num_logical_experts,
                model.expert_map.num_physical_experts, group.topology.num_ranks,
                config.mode, config.algorithm,
            )  # fmt: skip

    def _leave_alone(self, model: VllmModel, *, is_main: bool) -> None:
        why = f"{model.model_name}: vLLM built its routers without EPLB tables"
        if is_main:
            raise NothingToBalance(f"eplb_config: {why}: leave eplb_config out")
        if self._group.rank == 0:
            logger.warning("%s; its experts stay where they are", why)

    def end_of_loading(self) -> None:
        """All models are loaded; a stage without experts says so to those that wait for its count.

        Raises `NothingToBalance` when no stage has a model that lets its experts be placed.
        """
        self._group.publish_layers(0)
        if not self._balanced and not any(self._group.layers_of_stages()):
            raise NothingToBalance(
                f"eplb_config: vLLM's class of {self._vllm_config.model_config.model} does not let its "
                "experts be placed (it is no MixtureOfExperts): leave eplb_config out"
            )

    def is_main_model(self, model_config: object) -> bool:
        """Whether it is the engine's own model, and not the draft model beside it."""
        return model_config is self._vllm_config.model_config

    def _map_to_deploy(self, model: VllmModel) -> ExpertMap | None:
        """This stage's layers of the static map, on this engine's nodes."""
        if self.config.expert_map_path is None:
            return None
        path, layers = self.config.expert_map_path, self._group.layers_of_stages()
        part = deployed_map.part_of_map(
            ExpertMap.load(path),
            first_layer=sum(layers[: self._group.stage]),
            num_layers=layers[self._group.stage],
            total_layers=sum(layers),
            path=path,
        )
        deployed_map.check_fits(part, model.expert_map, path)
        return ExpertMap(part.physical_to_logical, part.num_logical_experts, self._group.topology)

    def _stage_recorder(self) -> StageMapRecorder | None:
        """Where each stage knows only its own layers, the file needs them all."""
        path = self.config.expert_map_record_path
        if path is None or self._group.num_stages == 1:
            return None
        return StageMapRecorder(path, self._group.stage, self._group.num_stages, self._group.engine_store)

    def _experts_per_token(self) -> int | None:
        text_config = self._vllm_config.model_config.hf_text_config
        for field in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"):
            value = getattr(text_config, field, None)
            if isinstance(value, int):
                return value
        return None

    # --- serving ---

    def step(self, *, is_dummy: bool) -> None:
        """A forward pass has ended on this rank."""
        self.steps += 1
        for each in self._balanced:
            expert_map = each.balancer.expert_map
            passed = Circumstances(expert_map, self.phase, is_dummy or not self._group.counts_tokens)
            arrived = each.counts.end_of_pass(passed)
            if arrived is None:
                each.balancer.step(None, phase=self.phase, is_dummy=is_dummy)
            else:
                each.balancer.step(
                    arrived.load,
                    phase=arrived.circumstances.phase,
                    counted_by=arrived.circumstances.expert_map,
                )

    def forget_load(self) -> None:
        """A profile pass has ended: nothing of it counts."""
        for each in self._balanced:
            each.counts.forget()
            if each.balancer.profiling is not None:
                each.balancer.profiling.discard_pass()

    # --- control ---

    def pause(self) -> None:
        for each in self._balanced:
            each.balancer.pause()

    def resume(self) -> None:
        for each in self._balanced:
            each.balancer.resume()

    def rebalance_now(self) -> None:
        for each in self._balanced:
            each.balancer.rebalance_now()

    def start_profiling(self) -> None:
        """Raises RuntimeError where compute time is not measured."""
        for each in self._balanced:
            each.balancer.start_profiling()

    def stop_profiling(self) -> None:
        """Raises RuntimeError where compute time is not measured."""
        for each in self._balanced:
            each.balancer.stop_profiling()

    def compute_statistics(self) -> Mapping[str, object]:
        """What experts cost, by model. Raises RuntimeError where it is not measured."""
        return {each.model.model_name: each.balancer.compute_statistics() for each in self._balanced}

    def drain(self) -> None:
        """Wait until no cycle runs on this rank; call `pause` first, on every rank."""
        for each in self._balanced:
            each.balancer.drain()

    def return_to_initial_layout(self, what: str) -> None:
        """The engine is about to load all its weights anew, in the only layout that its loader knows.

        Every rank calls it between the same two passes. Raises `WeightUpdateRefused` where that would leave
        a static map's promise, and what `Balancer.invalidate` raises when the ranks cannot agree.
        """
        if self.config.expert_map_path is not None and not self.config.dynamic_eplb:
            raise WeightUpdateRefused(
                f"{what} would undo the static expert map {self.config.expert_map_path}: "
                "start the engine anew with the new weights"
            )
        for each in self._balanced:
            each.balancer.invalidate(each.model.initial_map)

    def refuse_unless_initial(self, what: str) -> None:
        """Raises `WeightUpdateRefused` when an expert lies where the checkpoint loader does not look."""
        for each in self._balanced:
            if each.model.expert_map != each.model.initial_map:
                raise WeightUpdateRefused(
                    f"{what} writes experts into the places of the initial layout, but they have been "
                    "rearranged: reload all weights (reload_weights) first, which goes back to it"
                )

    def close(self) -> None:
        for each in self._balanced:
            each.balancer.close()

    # --- what can be seen ---

    def snapshot(self) -> Mapping[str, object]:
        """This rank's state as plain data for JSON; the top level speaks of the main model."""
        models = {each.model.model_name: each.balancer.snapshot() for each in self._balanced}
        main = {} if self._main is None else self._main.balancer.snapshot()
        return {
            **self._place(),
            "state": main.get("state", "idle"),
            "cycles": main.get("cycles", 0),
            "moved_experts": main.get("moved_experts", 0),
            "physical_to_logical": {name: shot["physical_to_logical"] for name, shot in models.items()},
            "models": models,
        }

    def status(self) -> Mapping[str, object]:
        """`snapshot` without the maps: cheap enough for every second."""
        models = {each.model.model_name: each.balancer.status() for each in self._balanced}
        return {**self._place(), "models": models}

    def _place(self) -> Mapping[str, object]:
        return {
            "rank": self._group.rank,
            "ep_size": self._group.topology.num_ranks,
            "stage": self._group.stage,
            "updated": time.time(),
        }


def _of_draft(config: EplbConfig) -> EplbConfig:
    """A draft model is balanced by the same keys; files speak of the main model."""
    return config.model_copy(
        update={
            "expert_map_path": None,
            "expert_map_record_path": None,
            "trace_record_path": None,
            "compute_cost_record_path": None,
        }
    )
