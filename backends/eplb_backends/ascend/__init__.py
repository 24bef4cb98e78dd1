"""Ascend NPUs, through torch_npu. Has never been run on one; docs/ascend.md says what was checked instead."""

from eplb_backends.ascend.backend import AscendBackend

__all__ = ["AscendBackend"]
