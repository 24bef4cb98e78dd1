"""The backend for host memory: gloo moves the weights, compiled kernels map the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.distributed import is_gloo_available

from eplb_backends.cpu import weights
from eplb_backends.cpu.gloo_backend import GlooBackend
from eplb_backends.cpu.streams import HostTimer, SerialStreams
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations

_COMPILE_S = 120.0
"""How long one rank's first compilation of the kernels may take longer than another's."""


class CpuBackend(GlooBackend):
    """Weights in host memory, moved by a gloo group of the backend's own."""

    name: ClassVar[str] = "cpu"
    device_type: ClassVar[str] = "cpu"
    collective = "gloo"

    @classmethod
    def availability(cls) -> Availability:
        versions = {"torch": str(torch.__version__)}
        if not is_gloo_available():
            return Availability(False, f"torch {torch.__version__} was built without gloo", versions)
        return Availability(True, "ready", versions)

    def default_streams(self) -> StreamOperations:
        return SerialStreams()

    def warm_up(self) -> None:
        """As `Backend.warm_up`; also compiles the kernels, so that no forward pass waits for the compiler."""
        from eplb_backends.cpu import kernels  # late: importing the compiler takes half a second

        self._touch_pairs()
        kernels.warm()
        self._open_group().meet("warm up", self._timeout_s + _COMPILE_S)

    # --- weights ---

    def allocate_staging(
        self, parameter: Sequence[torch.Tensor] | torch.Tensor, slots: int
    ) -> Sequence[torch.Tensor]:
        return weights.allocate_staging(parameter, slots)

    def swap_in(
        self,
        parameter: Sequence[torch.Tensor] | torch.Tensor,
        slots: Sequence[int],
        staging: Sequence[torch.Tensor],
        rows: Sequence[int],
    ) -> None:
        weights.swap_in(parameter, slots, staging, rows)

    def checksum(self, tensors: Sequence[torch.Tensor]) -> int:
        return weights.checksum(tensors)

    # --- the forward path ---

    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        """As `Backend.map_and_record`. Raises `ValueError` for an id that is no expert nor padding."""
        from eplb_backends.cpu.mapping import map_and_record

        return map_and_record(logical_ids, logical_to_physical, replica_count, load, offset)

    def timer(self) -> DeviceTimer:
        return HostTimer()
