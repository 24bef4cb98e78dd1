"""The backend for what torch calls cuda: its module, its versions, its pinned memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch.distributed import Store, is_gloo_available, is_nccl_available

from eplb_backends.accelerator import AcceleratorBackend, DeviceModule, TorchStreams, nixl_library
from eplb_backends.accelerator.backend import PINNED_BYTES
from eplb_backends.accelerator.collective_transfer import DeviceGroup
from eplb_backends.accelerator.streams import EventTimer
from eplb_backends.accelerator.transports import (
    AUTO,
    check_has_effect,
    check_nothing_waits,
    on_background_thread,
)
from eplb_backends.cuda.nccl_group import BLOCKING_WAIT, new_group
from eplb_backends.cuda.nccl_options import NcclOptions
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations

_MODULE = cast(DeviceModule, torch.cuda)


class CudaBackend(AcceleratorBackend):
    """Weights in GPU memory, moved by NIXL, through pinned host memory by gloo, or by NCCL.

    nccl_options: of the NCCL group, as `nccl_options.KNOWN`; they need transport "collective"
    """

    name: ClassVar[str] = "cuda"
    device_type: ClassVar[str] = "cuda"
    device_collective: ClassVar[str | None] = "nccl" if is_nccl_available() else None
    nixl_reads_device: ClassVar[bool] = True

    def __init__(
        self,
        streams: StreamOperations | None = None,
        *,
        transport: str = AUTO,
        pinned_bytes: int = PINNED_BYTES,
        nccl_options: Mapping[str, object] | None = None,
    ) -> None:
        self._nccl_options = NcclOptions({} if nccl_options is None else nccl_options)
        super().__init__(streams, transport=transport, pinned_bytes=pinned_bytes)
        check_has_effect("cuda", "NCCL", self._nccl_options.values, self.transport)
        if self.transport == "collective":
            check_nothing_waits("cuda", BLOCKING_WAIT)

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
        nccl = ", 'collective' (NCCL)" if is_nccl_available() else " (torch has no NCCL)"
        tested = "; ROCm is not tested" if torch.version.hip else ""
        reason = f"{count} GPUs; transports {on_background_thread()}{nccl}{tested}"
        return Availability(True, reason, versions)

    def default_streams(self) -> StreamOperations:
        return TorchStreams(_MODULE)

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def timer(self) -> DeviceTimer:
        return EventTimer(_MODULE)

    def _new_device_group(self, store: Store) -> DeviceGroup:
        return new_group(store, *self._place, self._nccl_options, watchdog_timeout=self._watchdog_timeout)


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "rocm": torch.version.hip}
    return {name: version for name, version in versions.items() if version} | nixl_library.versions()
