"""Expert parallelism in host memory, over gloo."""

from eplb_backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
