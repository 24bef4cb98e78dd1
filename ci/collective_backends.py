"""Backends of which the ranks of a test make the ones that use the device's collective library."""

from __future__ import annotations

from eplb_backends.ascend import AscendBackend
from eplb_backends.cuda import CudaBackend


class CollectiveAscend(AscendBackend):
    def __init__(self) -> None:
        super().__init__(transport="collective")


class CollectiveCuda(CudaBackend):
    def __init__(self) -> None:
        super().__init__(transport="collective")
