"""What the balancer asks of the platform that vLLM runs on: the devices, and whose balancer serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_ASCEND = "npu"
# The value of `communicator` that can be made where no balancing of vLLM's own will use it.
_COMMUNICATORS = {"cpu": "torch_nccl", _ASCEND: "torch_nccl", "xpu": "torch_xccl"}


@dataclass(frozen=True)
class DevicePlatform:
    """vLLM's current platform.

    device_type: as in `torch.device.type`
    refuses_eplb: the platform itself says that it has no EPLB (asked where vLLM has that question)
    chooses_communicator: the platform itself completes vLLM's `eplb_config`
    uses_v2_runner: whether the second model runner is asked for; None when nobody said
    """

    device_type: str
    refuses_eplb: bool = False
    chooses_communicator: bool = False
    uses_v2_runner: bool | None = None

    @classmethod
    def current(cls) -> DevicePlatform:
        """The platform of this process. Imports vLLM."""
        from vllm import envs
        from vllm.platforms import current_platform

        return cls.of(current_platform, getattr(envs, "VLLM_USE_V2_MODEL_RUNNER", None))

    @classmethod
    def of(cls, platform: object, uses_v2_runner: bool | None) -> DevicePlatform:
        """Read from an object as `vllm.platforms.current_platform`, whose newer methods may be missing."""
        device_type = str(getattr(platform, "device_type", ""))
        supports_eplb = _method(platform, "supports_eplb")
        return cls(
            device_type=device_type,
            # What is missing on the CPU, this plugin provides.
            refuses_eplb=device_type != "cpu" and supports_eplb is not None and not supports_eplb(),
            chooses_communicator=_method(platform, "check_and_update_eplb_config") is not None,
            uses_v2_runner=uses_v2_runner,
        )

    @property
    def balances_by_itself(self) -> bool:
        """vllm-ascend's first runner reads `eplb_config` for a balancer of its own, and refuses vLLM's."""
        return self.device_type == _ASCEND and not self.uses_v2_runner

    @property
    def refuses_our_keys(self) -> bool:
        """vllm-ascend's second runner takes vLLM's EPLB, and no key of ours in `additional_config`."""
        return self.device_type == _ASCEND and bool(self.uses_v2_runner)

    @property
    def communicator(self) -> str | None:
        """The `communicator` to put in vLLM's `eplb_config`; None leaves it to the platform."""
        if self.chooses_communicator:
            return None
        return _COMMUNICATORS.get(self.device_type, "torch_gloo")


def _method(platform: object, name: str) -> Callable[[], object] | None:
    """A method of the platform; asked of its class, because vLLM's platforms warn of what they lack."""
    return getattr(platform, name) if callable(getattr(type(platform), name, None)) else None
