"""Intel GPUs, over what torch has in common for all accelerators. Has never been run on one."""

from eplb_backends.xpu.backend import XpuBackend

__all__ = ["XpuBackend"]
