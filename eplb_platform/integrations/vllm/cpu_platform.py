"""What vLLM's expert parallelism and EPLB tables need on CPUs. On other devices nothing here does anything.

Importing this module imports no part of vLLM: the front end calls `admit_eplb` before it needs more.
"""

from __future__ import annotations

from typing import Any

from eplb_platform.integrations.vllm.compatibility import expect

_EXPERTS = "vllm.model_executor.layers.fused_moe"
_CPU = ("cpu",)

expect("vllm.config.parallel:current_platform.is_cuda_alike", needed_on=_CPU)
for _name in ("CPUUnquantizedExperts", "CPUExpertsFp8", "CPUExpertsMxfp4", "CPUExpertsInt8"):
    expect(
        f"{_EXPERTS}.experts.cpu_moe:{_name}.apply",
        "output", "hidden_states", "topk_weights", "topk_ids", "expert_map",
        needed_on=_CPU,
    )  # fmt: skip
expect(f"{_EXPERTS}.runner.moe_runner:MoERunner._select_forward", "self", needed_on=_CPU)
expect(f"{_EXPERTS}.runner.moe_runner:MoERunner.shared_experts", needed_on=_CPU)
expect(f"{_EXPERTS}.config:FusedMoEParallelConfig", "use_ep", needed_on=_CPU)
expect(
    f"{_EXPERTS}.router.base_router:eplb_map_to_physical_and_record",
    "topk_ids", "expert_load_view", "logical_to_physical_map", "logical_replica_count", "record_enabled",
    "num_unpadded_tokens",
    needed_on=_CPU,
)  # fmt: skip
_COMMUNICATORS = "vllm.distributed.device_communicators"
expect(
    f"{_COMMUNICATORS}.cpu_communicator:CpuCommunicator.all_gatherv", "input_", "dim", "sizes", needed_on=_CPU
)
expect(
    f"{_COMMUNICATORS}.cpu_communicator:CpuCommunicator.reduce_scatterv",
    "input_", "dim", "sizes",
    needed_on=_CPU,
)  # fmt: skip
expect("vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model", needed_on=_CPU)
expect("vllm.v1.worker.cpu_model_runner:CPUModelRunner.eplb_step", "is_dummy", "is_profile", needed_on=_CPU)
expect("vllm.model_executor.models.interfaces:get_mixture_of_experts_model", needed_on=_CPU)
expect("vllm.v1.worker.gpu.eplb_utils:draft_model_supports_eplb", needed_on=_CPU)
expect("vllm.v1.worker.gpu.eplb_utils:eplb_draft_model_name", needed_on=_CPU)


class _EplbPlatform:
    """The CPU platform as `vllm.config.parallel` sees it: there `is_cuda_alike` asks for EPLB alone."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda_alike(self) -> bool:
        return True


def admit_eplb() -> None:
    """Let `ParallelConfig(enable_eplb=True)` through on a CPU. For any process; idempotent."""
    from vllm.config import parallel

    platform: Any = parallel.current_platform
    if platform.is_cpu() and not isinstance(platform, _EplbPlatform):
        vars(parallel)["current_platform"] = _EplbPlatform(platform)


def equip_worker() -> None:
    """Make experts, routers, communicators and the model runner of this process fit for EPLB on a CPU.

    For a worker before its model is built; idempotent.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from eplb_platform.integrations.vllm import cpu_communicator, cpu_experts, cpu_routing, cpu_runner

    for part in (cpu_experts, cpu_routing, cpu_communicator, cpu_runner):
        part.install()
