"""The group of HCCL that the backend has for itself. Has never been run on a device."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from types import ModuleType
from typing import Protocol

import torch
from torch.distributed import Store, Work

from eplb_backends.ascend.hccl_options import HcclOptions
from eplb_backends.ascend.vendor_messages import explained
from eplb_platform.backend import Message

BLOCKING_WAIT = ("TORCH_HCCL_BLOCKING_WAIT", "HCCL_BLOCKING_WAIT")
"""Environment variables."""


class HcclLibrary(Protocol):
    """What is used of `ProcessGroupHCCL`."""

    def batch_isend_irecv(
        self, kinds: list[str], tensors: list[torch.Tensor], peers: list[int], /
    ) -> Work: ...

    def abort_hccl_comm(self, reason: str, /) -> object: ...


class HcclGroup:
    """A `DeviceGroup`. HCCL sends a whole exchange as one operation, in the order in which it is given."""

    def __init__(self, library: HcclLibrary) -> None:
        self._library = library

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """As `DeviceGroup.exchange`. `synchronize` makes the current stream wait, not the thread."""
        batch = [*(("isend", message) for message in sends), *(("irecv", message) for message in receives)]
        try:
            work = self._library.batch_isend_irecv(
                [kind for kind, _ in batch],
                [message.tensor for _, message in batch],
                [message.peer for _, message in batch],
            )
            work.synchronize()
        except RuntimeError as error:
            raise RuntimeError(explained(error)) from error

    def abort(self) -> None:
        self._library.abort_hccl_comm("eplb")


def new_group(
    torch_npu: ModuleType,
    store: Store,
    rank: int,
    num_ranks: int,
    options: HcclOptions,
    *,
    watchdog_timeout: timedelta,
) -> HcclGroup:
    """A group without a communicator yet: the first exchange makes it."""
    pg_options = options.to_process_group(torch_npu, watchdog_timeout)
    library = torch_npu._C._distributed_c10d.ProcessGroupHCCL(store, rank, num_ranks, pg_options)
    return HcclGroup(library)
