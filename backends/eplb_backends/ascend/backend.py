"""The backend for what torch_npu calls npu: its streams, its memory formats, its operator for routing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch.distributed import Store, is_gloo_available

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
from eplb_backends.ascend import (
    coupled_parameters,
    environment,
    hccl_group,
    nz_format,
    token_counts,
    update_expert,
    vendor_messages,
)
from eplb_backends.ascend.hccl_options import HcclOptions, check_outlasts
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations

_log = logging.getLogger(__name__)

ROUTINGS = ("torch", "operator")


class AscendBackend(AcceleratorBackend):
    """Weights in NPU memory, in plain and in NZ format, moved through pinned host memory or by HCCL.

    hccl_options: of the HCCL group, as `hccl_options.KNOWN`; they need a transport that uses HCCL
    routing: "torch", the rule of every backend; "operator", npu_moe_update_expert where it is there, answers
        as documented, and takes the shapes, and the rule of every backend otherwise
    """

    name: ClassVar[str] = "ascend"
    device_type: ClassVar[str] = "npu"
    device_collective: ClassVar[str | None] = "hccl"
    layout = nz_format.NzLayout()

    def __init__(
        self,
        streams: StreamOperations | None = None,
        *,
        transport: str = AUTO,
        pinned_bytes: int = PINNED_BYTES,
        hccl_options: Mapping[str, object] | None = None,
        routing: str = "torch",
    ) -> None:
        self._hccl_options = HcclOptions({} if hccl_options is None else hccl_options)
        if routing not in ROUTINGS:
            raise ValueError(f"ascend: no routing {routing!r}; there are {', '.join(ROUTINGS)}")
        super().__init__(streams, transport=transport, pinned_bytes=pinned_bytes)
        check_has_effect("ascend", "HCCL", self._hccl_options.values, self.transport)
        if self.transport == "collective":
            check_nothing_waits("ascend", hccl_group.BLOCKING_WAIT)
        self._update_expert = _operator() if routing == "operator" else None

    @classmethod
    def availability(cls) -> Availability:
        """As `Backend.availability`. Imports torch_npu where CANN can be loaded; initialises no device."""
        versions = environment.versions() | nixl_library.versions()
        if not is_gloo_available():
            return Availability(False, f"torch {torch.__version__} was built without gloo", versions)
        try:
            count = environment.count_devices()
        except environment.Unavailable as missing:
            return Availability(False, str(missing), versions)
        reason = f"{count} NPUs; transports {on_background_thread()}, 'collective' (HCCL)"
        return Availability(True, reason, versions)

    def attach(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        """As `Backend.attach`. Raises `ValueError` where HCCL would give up before the backend does."""
        if self.transport == "collective":
            check_outlasts(self._hccl_options, timeout_s)
        super().attach(store, rank, num_ranks, timeout_s)

    def default_streams(self) -> StreamOperations:
        return TorchStreams(_module())

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def timer(self) -> DeviceTimer:
        return EventTimer(_module())

    def _new_device_group(self, store: Store) -> DeviceGroup:
        return hccl_group.new_group(
            environment.torch_npu(),
            store,
            *self._place,
            self._hccl_options,
            watchdog_timeout=self._watchdog_timeout,
        )

    # --- weights ---

    def check_moved_together(
        self,
        layer: Mapping[str, Sequence[torch.Tensor] | torch.Tensor],
        moved: Sequence[str],
        *,
        slots: int,
    ) -> None:
        """As `Backend.check_moved_together`: the scales of W8A8 and W4A8 move with their weights."""
        coupled_parameters.check_moved_together(layer, moved, slots=slots)

    def allocate_staging(
        self, parameter: Sequence[torch.Tensor] | torch.Tensor, slots: int
    ) -> Sequence[torch.Tensor]:
        """As `Backend.allocate_staging`, in the parameter's format. Refuses stacks in a format such as NZ."""
        nz_format.check_parameter(parameter)
        try:
            staging = super().allocate_staging(parameter, slots)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(vendor_messages.explained(error)) from error
        for staged in staging:
            nz_format.check_same_format(parameter[0], staged, "staging")
        return staging

    def swap_in(
        self,
        parameter: Sequence[torch.Tensor] | torch.Tensor,
        slots: Sequence[int],
        staging: Sequence[torch.Tensor],
        rows: Sequence[int],
    ) -> None:
        for slot, row in zip(slots, rows, strict=False):  # of other lengths: the shared code says so
            nz_format.check_same_format(parameter[slot], staging[row], f"staged expert for slot {slot}")
        super().swap_in(parameter, slots, staging, rows)

    # --- the forward path ---

    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        operator = self._update_expert
        if operator is None or not update_expert.can_map(logical_ids, logical_to_physical, self._num_ranks):
            return super().map_and_record(logical_ids, logical_to_physical, replica_count, load, offset)
        return update_expert.map_and_record(
            operator, logical_ids, logical_to_physical, replica_count, load, offset
        )

    def record_group_list(
        self, load: torch.Tensor, group_list: torch.Tensor, group_list_type: int, *, first_slot: int
    ) -> None:
        """As `Backend.record_group_list`, of cumulative sums (type 0) and counts (type 1)."""
        token_counts.add_to_load(load, group_list, group_list_type, first_slot=first_slot)


def _module() -> DeviceModule:
    return cast(DeviceModule, environment.torch_npu().npu)


def _operator() -> update_expert.UpdateExpert | None:
    """npu_moe_update_expert where it is there and right; asked at start, as the answer is waited for."""
    operator = getattr(environment.torch_npu(), "npu_moe_update_expert", None)
    if operator is None:
        _log.warning("torch_npu has no npu_moe_update_expert: routing by torch's operators")
        return None
    device = torch.device("npu", _module().current_device())
    if not update_expert.answers_as_documented(operator, device):
        _log.warning("npu_moe_update_expert does not answer as documented here: routing by torch's operators")
        return None
    return cast(update_expert.UpdateExpert, operator)
