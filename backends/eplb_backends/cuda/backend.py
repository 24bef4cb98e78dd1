"""The backend for what torch calls cuda: its module, its versions, its pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch.distributed import is_gloo_available

from eplb_backends.accelerator import AcceleratorBackend, DeviceModule, TorchStreams
from eplb_backends.accelerator.streams import EventTimer
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations

_MODULE = cast(DeviceModule, torch.cuda)


class CudaBackend(AcceleratorBackend):
    """Weights in GPU memory, moved through pinned host memory by a gloo group of the backend's own."""

    name: ClassVar[str] = "cuda"
    device_type: ClassVar[str] = "cuda"
    collective: ClassVar[str] = "gloo"

    @classmethod
    def availability(cls) -> Availability:
        """As `Backend.availability`. Counts devices without a driver context, so that processes may fork."""
        versions = _versions()
        if not torch.backends.cuda.is_built():
            reason = f"torch {torch.__version__} was built without CUDA and ROCm: install a build with one"
            return Availability(False, reason, versions)
        if not is_gloo_available():
            return Availability(False, f"torch {torch.__version__} was built without gloo", versions)
        count = torch.cuda.device_count()
        if count == 0:
            return Availability(
                False, "torch sees no GPU: check the driver and CUDA_VISIBLE_DEVICES", versions
            )
        tested = "ROCm is not tested" if torch.version.hip else "weights move through host memory"
        return Availability(True, f"{count} GPUs; {tested}", versions)

    def default_streams(self) -> StreamOperations:
        return TorchStreams(_MODULE)

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def timer(self) -> DeviceTimer:
        return EventTimer(_MODULE)


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "rocm": torch.version.hip}
    return {name: version for name, version in versions.items() if version}
