"""vllm-ascend's own reading, planning, checking and writing of expert maps.

Real: `vllm_ascend.eplb`, from the file to each rank's tables, through its cycle, and back to the file.
Stand-ins: vLLM's logger and groups, quantization, the device (`Tensor.npu` gives the tensor itself), the
model's layers, the transfer of weights, and the engine's policy 3, which needs SciPy.
"""

from __future__ import annotations

import importlib
import logging
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.engines.stand_ins import Provide, one_process


class VllmAscendEngine:
    def __init__(self, provide: Provide) -> None:
        self.errors: list[str] = []
        logger = logging.Logger("vllm_ascend")
        logger.addHandler(_Kept(self.errors))
        provide("torch_npu")
        provide("vllm")
        provide("vllm.logger", logger=logger)
        provide("vllm.envs", VLLM_ALLOW_EXPERT_LOAD_COLLECTING=False)
        provide("vllm.v1.utils", record_function_or_nullcontext=lambda name: nullcontext())
        provide("vllm.distributed.parallel_state", get_pp_group=lambda: SimpleNamespace(rank_in_group=0))
        provide("vllm.distributed", get_ep_group=lambda: SimpleNamespace(rank_in_group=0))
        provide("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
        settings = SimpleNamespace(enable_fused_mc2=0)
        provide("vllm_ascend.ascend_config", get_ascend_config=lambda: settings)
        kinds = Enum("QuantType", "NONE W8A8 W4A8 MXFP4 MXFP8 W4A8MXFP")
        provide("vllm_ascend.quantization.quant_type", QuantType=kinds)
        provide("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=lambda: None)
        provide("vllm_ascend.eplb.core.policy.policy_flashlb", FlashLB=None, warm_up=None)
        self.tables: Any = importlib.import_module("vllm_ascend.eplb.core.eplb_utils")
        self.worker: Any = importlib.import_module("vllm_ascend.eplb.core.eplb_worker")
        self.adaptor: Any = importlib.import_module("vllm_ascend.eplb.adaptor.vllm_adaptor")
        self.updator: Any = importlib.import_module("vllm_ascend.eplb.eplb_updator")

    def start_layer(self, path: Path | None, layer: int, *, experts: int, ranks: int, rank: int) -> Any:
        """What a MoE layer starts with from the file at `path`, on one rank.

        The global map [ranks, experts], the rank's map, its log2phy, and the number of redundant experts.
        """
        configuration = SimpleNamespace(
            expert_map_path=None if path is None else str(path),
            dynamic_eplb=True,
            num_redundant_experts=ranks,
        )
        moe = SimpleNamespace(num_experts=experts, ep_size=ranks, ep_rank=rank)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "npu", lambda tensor: tensor, raising=False)
            return self.tables.init_eplb_config(configuration, layer, moe)

    def global_maps(self, path: Path, layers: int, *, experts: int, ranks: int) -> torch.Tensor:
        """[layers, ranks, experts]: the slot of an expert on a rank, -1 where it is not."""
        found = [self.start_layer(path, i, experts=experts, ranks=ranks, rank=0)[0] for i in range(layers)]
        return torch.stack(found)

    def replan(self, maps: torch.Tensor, load: NDArray[np.int64], policy: int) -> torch.Tensor:
        """The maps after one update of the engine's worker; load: tokens of [layers, ranks, slots]."""
        shared = {"expert_maps": maps, "moe_load": torch.from_numpy(load)}
        with pytest.MonkeyPatch.context() as patch:
            devices = SimpleNamespace(device_count=lambda: maps.shape[1])
            patch.setattr(torch, "npu", devices, raising=False)
            self.worker.EplbWorker(shared, policy).do_update()
        return shared["expert_maps"]

    def record(self, maps: torch.Tensor, path: Path) -> None:
        """What `expert_map_record_path` gets."""
        adaptor = self.adaptor.VllmEplbAdaptor.__new__(self.adaptor.VllmEplbAdaptor)
        adaptor.rank_id = 0
        adaptor._export_tensor_to_file(maps, str(path))

    def serve_recording(
        self, start: Path, recorded: Path, load: NDArray[np.int64], *, experts: int, collect: int, plan: int
    ) -> int:
        """Rank 0 serves with the map at `start` until the engine has recorded another; the passes it took.

        load: tokens of [layers, ranks, slots], as gathered from all ranks; collect, plan: passes of a cycle
        """
        layers, ranks, slots = load.shape
        model = SimpleNamespace(quant_config=None, config=SimpleNamespace(first_k_dense_replace=0))
        group = SimpleNamespace(all_gather=lambda own, dim: torch.from_numpy(load))
        shared: dict[str, Any] = {}
        worker = self.worker.EplbWorker(shared, policy_type=1)
        update: list[Any] = []
        process = SimpleNamespace(
            shared_dict=shared,
            planner_q=SimpleNamespace(put=lambda one: update.append(worker.do_update())),
            block_update_q=SimpleNamespace(get=lambda: update.pop()),
        )
        configuration = SimpleNamespace(
            eplb_policy_type=1,
            expert_map_path=str(start),
            expert_map_record_path=str(recorded),
            expert_heat_collection_interval=collect,
            algorithm_execution_interval=plan,
        )
        with pytest.MonkeyPatch.context() as patch, one_process():
            patch.setattr(self.updator, "get_dynamic_eplb_group", lambda: group)
            patch.setattr(self.adaptor.VllmEplbAdaptor, "_registered_moe_layers", [])
            for layer in range(layers):
                tables = self.start_layer(start, layer, experts=experts, ranks=ranks, rank=0)
                self.adaptor.VllmEplbAdaptor.register_layer(_Layer(tables, slots))
            updator = self.updator.EplbUpdator(configuration, _Loader(), process, SimpleNamespace(pid=0))
            updator.set_adaptor(self.adaptor.VllmEplbAdaptor(model))
            shared["expert_maps"] = updator.adaptor.get_global_expert_map()
            passes = 0
            while not recorded.exists():
                updator.forward_before()
                updator.forward_end()
                passes += 1
        return passes


class _Layer:
    """A MoE layer of rank 0, as the engine's balancer sees one."""

    def __init__(self, tables: Any, slots: int) -> None:
        self.global_expert_map, _, self._log2phy, _ = tables
        self.local_num_experts, self.ep_rank = slots, 0
        self.w13_weight, self.w2_weight = torch.zeros(slots, 2, 2), torch.zeros(slots, 2, 2)
        self.moe_load = torch.zeros(slots, dtype=torch.int64)

    def get_log2phy_map(self) -> torch.Tensor:
        return self._log2phy

    def clear_moe_load(self) -> None:
        self.moe_load.zero_()


class _Loader:
    """Moves no weights: a recording engine drops what it received."""

    num_layers = 0

    def set_log2phy_map(self, log2phy: torch.Tensor) -> None:
        pass

    def generate_expert_d2d_transfer_task(self, *task: object) -> None:
        pass

    def asyn_expert_weight_transfer(self, requests: list[object]) -> None:
        pass


class _Kept(logging.Handler):
    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(record.getMessage())
