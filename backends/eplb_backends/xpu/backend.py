"""The backend for what torch calls xpu. Has never been run on such a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch.distributed import is_gloo_available

from eplb_backends.accelerator import AcceleratorBackend, DeviceModule, TorchStreams
from eplb_backends.accelerator.streams import EventTimer
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations

_MODULE = cast(DeviceModule, torch.xpu)


class XpuBackend(AcceleratorBackend):
    """Weights in GPU memory, moved through pinned host memory by a gloo group of the backend's own."""

    name: ClassVar[str] = "xpu"
    device_type: ClassVar[str] = "xpu"
    collective: ClassVar[str] = "gloo"

    @classmethod
    def availability(cls) -> Availability:
        versions = {"torch": str(torch.__version__)}
        count = torch.xpu.device_count()
        if count == 0:
            return Availability(False, f"torch {torch.__version__} sees no XPU", versions)
        if not is_gloo_available():
            return Availability(False, f"torch {torch.__version__} was built without gloo", versions)
        return Availability(True, f"{count} devices; not tested on any", versions)

    def default_streams(self) -> StreamOperations:
        return TorchStreams(_MODULE)

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def timer(self) -> DeviceTimer:
        return EventTimer(_MODULE)
