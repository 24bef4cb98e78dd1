"""A `DeviceGroup` over a process group of torch whose point-to-point calls can be one batch.

Made directly, not by `torch.distributed.new_group`: the model's default group need not exist, and is not
asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch.distributed import Work

from eplb_platform.backend import Message


class CoalescingLibrary(Protocol):
    """What is used of `ProcessGroupNCCL` and `ProcessGroupXCCL`."""

    def _start_coalescing(self) -> None: ...

    def _end_coalescing(self) -> Work: ...

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> object: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> object: ...

    def abort(self) -> None: ...


class CoalescingGroup:
    """One group for one epoch."""

    def __init__(self, library: CoalescingLibrary) -> None:
        self._library = library

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """As `DeviceGroup.exchange`. `synchronize` makes the current stream wait, not the thread."""
        library = self._library
        library._start_coalescing()
        try:
            for message in receives:
                library.recv([message.tensor], message.peer, 0)
            for message in sends:
                library.send([message.tensor], message.peer, 0)
        except BaseException:
            with suppress(RuntimeError):
                library._end_coalescing()
            raise
        library._end_coalescing().synchronize()

    def abort(self) -> None:
        self._library.abort()
