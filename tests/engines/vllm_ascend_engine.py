"""vllm-ascend's own reading, planning, checking and writing of expert maps.

Real: `vllm_ascend.eplb`, from the file to each rank's tables and back to the file. Stand-ins: vLLM's logger
and groups, quantization, the device (`Tensor.npu` gives the tensor itself), and the engine's policy 3, which
needs SciPy.
"""

from __future__ import annotations

import importlib
import logging
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.engines.stand_ins import Provide


class VllmAscendEngine:
    def __init__(self, provide: Provide) -> None:
        self.errors: list[str] = []
        logger = logging.Logger("vllm_ascend")
        logger.addHandler(_Kept(self.errors))
        provide("torch_npu")
        provide("vllm")
        provide("vllm.logger", logger=logger)
        provide("vllm.distributed", get_ep_group=lambda: SimpleNamespace(rank_in_group=0))
        provide("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
        provide("vllm_ascend.ascend_config", get_ascend_config=None)
        kinds = Enum("QuantType", "NONE W8A8 W4A8 MXFP4 MXFP8 W4A8MXFP")
        provide("vllm_ascend.quantization.quant_type", QuantType=kinds)
        provide("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=lambda: None)
        provide("vllm_ascend.eplb.core.policy.policy_flashlb", FlashLB=None, warm_up=None)
        self.tables: Any = importlib.import_module("vllm_ascend.eplb.core.eplb_utils")
        self.worker: Any = importlib.import_module("vllm_ascend.eplb.core.eplb_worker")
        self.adaptor: Any = importlib.import_module("vllm_ascend.eplb.adaptor.vllm_adaptor")

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


class _Kept(logging.Handler):
    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(record.getMessage())
