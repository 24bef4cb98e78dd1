"""SGLang's own expert locations and recorder.

Real: all of `sglang.srt.eplb`, `sglang.srt.environ`, and einops. Stand-ins: the engine's settings, its model,
its forward batches, its device and its process group of one rank.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.engines.stand_ins import Provide, one_process

PREFILL = 1


class SglangEngine:
    def __init__(self, provide: Provide) -> None:
        self.moe = SimpleNamespace(
            ep_dispatch_algorithm="static",
            moe_a2a_backend="none",
            deepep_mode="normal",
            ep_join_mode=None,
            eplb_algorithm="auto",
            elastic_ep_backend=None,
        )
        self.parallel = SimpleNamespace(nnodes=1, elastic_ep_initial_size=None)
        resources = SimpleNamespace(expert_location_metadata=None, expert_distribution_recorder=None)
        execution = SimpleNamespace(moe=self.moe, overlap=SimpleNamespace(enable_two_batch_overlap=False))
        provide(
            "sglang.srt.runtime_context",
            get_device=lambda: SimpleNamespace(device="cpu"),
            get_exec=lambda: execution,
            get_parallel=lambda: self.parallel,
            get_resources=lambda: resources,
            get_platform=lambda: SimpleNamespace(is_hip=False),
            get_schedule=lambda: SimpleNamespace(chunked_prefill_size=64),
            logs_expert_balancedness_to_server_log=lambda: False,
            reports_expert_balancedness=lambda: False,
        )
        provide("sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
        provide("sglang.srt.layers.moe", get_moe_a2a_backend=lambda: None)
        provide(
            "sglang.srt.utils",
            Withable=_Withable,
            get_device=lambda: "cpu",
            get_int_env_var=lambda name, default=0: int(os.environ.get(name, default)),
        )
        provide("sglang.srt.model_executor.forward_batch_info", ForwardBatch=object, ForwardMode=object)
        provide(
            "sglang.srt.observability.metrics_collector",
            STAT_LOGGER_ROLE_EXPERT_DISPATCH="",
            ExpertDispatchCollector=object,
            resolve_collector_class=lambda role, default: default,
        )
        provide("sglang.srt.model_loader", get_model_architecture=lambda config: (_Model, ""))
        self.location: Any = importlib.import_module("sglang.srt.eplb.expert_location")
        self.distribution: Any = importlib.import_module("sglang.srt.eplb.expert_distribution")
        self.reader: Any = importlib.import_module("sglang.srt.eplb.eplb_simulator.reader")

    def initial_location(
        self, given: str, *, layers: int, experts: int, redundant: int, ep_size: int, rank: int = 0
    ) -> Any:
        """What the engine makes of `--init-expert-location GIVEN` at its start."""
        self.moe.init_expert_location = given
        self.moe.ep_num_redundant_experts = redundant
        self.parallel.ep_size = self.parallel.tp_size = ep_size
        config = SimpleNamespace(hf_config=SimpleNamespace(layers=layers, experts=experts))
        with one_process():
            return self.location.compute_initial_expert_location_metadata(config, rank)

    def record(
        self,
        folder: Path,
        tokens: NDArray[np.int64],
        rows: NDArray[np.int64],
        *,
        mode: str,
        ep_size: int,
        buffer_size: int = -1,
    ) -> None:
        """Serve the tokens with the recorder on, and dump what each rank recorded into the folder.

        tokens: [forward passes, ranks, layers, tokens, chosen], the physical experts chosen; -1 for none
        rows: [layers, physical], the map in use
        """
        experts = int(rows.max()) + 1
        given = f'{{"physical_to_logical_map": {rows.tolist()}}}'
        shape = {"layers": len(rows), "experts": experts, "redundant": rows.shape[1] - experts}
        self.moe.expert_distribution_recorder_mode = mode
        self.moe.expert_distribution_recorder_buffer_size = buffer_size
        self.moe.moe_a2a_backend = "deepep" if mode == "stat_approx" else "none"
        try:
            with pytest.MonkeyPatch.context() as patch, one_process():
                patch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(folder))
                patch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
                for rank in range(tokens.shape[1]):
                    metadata = self.initial_location(given, **shape, ep_size=ep_size, rank=rank)
                    recorder = self.distribution.ExpertDistributionRecorder.init_new(metadata, rank)
                    recorder.start_record()
                    for number, chosen in enumerate(tokens[:, rank]):
                        self._forward(recorder, number, chosen, rank, rows.shape[1] // ep_size)
                    recorder.stop_record()
                    recorder.dump_record()
        finally:
            self.moe.moe_a2a_backend = "none"

    def _forward(self, recorder: Any, number: int, chosen: NDArray[np.int64], rank: int, local: int) -> None:
        """One pass of a rank: each MoE layer tells the recorder what its router, or its dispatch, did."""
        count = chosen.shape[1]
        batch = SimpleNamespace(
            input_ids=torch.arange(count),
            positions=torch.arange(count),
            extend_seq_lens_cpu=[count],
            forward_mode=SimpleNamespace(value=PREFILL),
        )
        with recorder.with_forward_pass(number, batch):
            for layer, experts in enumerate(chosen):
                if (experts < 0).all():
                    continue  # a dense layer
                with recorder.with_current_layer(layer):
                    if self.moe.moe_a2a_backend == "deepep":
                        mine = np.bincount(experts[experts >= 0], minlength=(rank + 1) * local)
                        received = mine[rank * local : (rank + 1) * local].tolist()
                        recorder.on_deepep_dispatch_normal(received, None, None, None)
                    else:
                        recorder.on_select_experts(torch.from_numpy(experts))


class _Model:
    @staticmethod
    def get_model_config_for_expert_location(hf_config: Any) -> Any:
        return SimpleNamespace(
            num_layers=hf_config.layers, num_logical_experts=hf_config.experts, num_groups=None
        )


class _Withable:
    """A value that holds inside a with block."""

    def __init__(self) -> None:
        self.value: object = None

    @contextmanager
    def with_value(self, value: object) -> Iterator[None]:
        self.value = value
        try:
            yield
        finally:
            self.value = None
