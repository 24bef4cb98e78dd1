"""The Ascend backend with the transport that enqueues HCCL's operations on the forward thread."""

from __future__ import annotations

from eplb_backends.ascend import AscendBackend


class CollectiveAscend(AscendBackend):
    def __init__(self) -> None:
        super().__init__(transport="collective", hccl_options={"hccl_buffer_size": 55})
