"""NVIDIA GPUs, and AMD's where torch is built for ROCm, which calls them cuda too."""

from eplb_backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
