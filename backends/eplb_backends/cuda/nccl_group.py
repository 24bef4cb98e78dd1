"""The group of NCCL that the backend has for itself."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

from torch.distributed import Store

from eplb_backends.accelerator.coalescing_group import CoalescingGroup, CoalescingLibrary
from eplb_backends.cuda.nccl_options import NcclOptions

BLOCKING_WAIT = ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
"""Environment variables."""


def new_group(
    store: Store, rank: int, num_ranks: int, options: NcclOptions, *, watchdog_timeout: timedelta
) -> CoalescingGroup:
    """A group without a communicator yet: the first exchange makes it.

    watchdog_timeout: after which torch ends the process; longer than any of ours
    """
    from torch.distributed import ProcessGroupNCCL  # not in every build

    pg_options = ProcessGroupNCCL.Options()
    pg_options._timeout = watchdog_timeout
    options.apply_to(pg_options)
    library = ProcessGroupNCCL(store, rank, num_ranks, pg_options)
    return CoalescingGroup(cast(CoalescingLibrary, library))
