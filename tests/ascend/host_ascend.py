"""The Ascend backend on tensors in host memory, with a fake of torch_npu in the process that makes one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import ClassVar

import torch

from eplb_backends.ascend import AscendBackend
from eplb_backends.cpu.streams import HostTimer, SerialStreams
from eplb_platform.backend import DeviceTimer, StreamOperations
from tests.fake_torch_npu import FakeTorchNpu


class HostAscend(AscendBackend):
    """Little pinned memory, so that exchanges take several rounds."""

    device_type: ClassVar[str] = "cpu"

    def __init__(self) -> None:
        self.torch_npu = FakeTorchNpu()
        sys.modules["torch_npu"] = self.torch_npu
        super().__init__(pinned_bytes=1 << 20)

    def default_streams(self) -> StreamOperations:
        return SerialStreams()

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def timer(self) -> DeviceTimer:
        return HostTimer()
