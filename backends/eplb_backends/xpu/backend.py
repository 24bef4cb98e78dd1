"""The backend for what torch calls xpu. Has never been run on such a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch.distributed import Store, is_gloo_available, is_xccl_available

from eplb_backends.accelerator import AcceleratorBackend, DeviceModule, TorchStreams, nixl_library
from eplb_backends.accelerator.coalescing_group import CoalescingGroup, CoalescingLibrary
from eplb_backends.accelerator.collective_transfer import DeviceGroup
from eplb_backends.accelerator.streams import EventTimer
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations

_MODULE = cast(DeviceModule, torch.xpu)


class XpuBackend(AcceleratorBackend):
    """Weights in GPU memory, moved through pinned host memory by gloo or by XCCL, in a group of its own."""

    name: ClassVar[str] = "xpu"
    device_type: ClassVar[str] = "xpu"
    device_collective: ClassVar[str | None] = "xccl" if is_xccl_available() else None

    @classmethod
    def availability(cls) -> Availability:
        versions = {"torch": str(torch.__version__)} | nixl_library.versions()
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

    def _new_device_group(self, store: Store) -> DeviceGroup:
        from torch.distributed import ProcessGroupXCCL  # not in every build

        options = ProcessGroupXCCL.Options()
        options._timeout = self._watchdog_timeout
        return CoalescingGroup(cast(CoalescingLibrary, ProcessGroupXCCL(store, *self._place, options)))
