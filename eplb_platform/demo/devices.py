"""The device that a rank serves on, and how the model's own collectives reach it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from eplb_platform.backend import BackendError, discover_backends


def take_device(backend: str, rank: int) -> torch.device:
    """The current device from now on: the rank's own, or, where there are fewer, one that ranks share.

    backend: as in `load_backend`, whose backends are made on the current device
    """
    device_type = "cpu" if backend == "auto" else _device_type(backend)
    if device_type == "cpu":
        return torch.device("cpu")
    number = rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(number)
    return torch.device(device_type, number)


def group_backend(device: torch.device, num_ranks: int) -> str:
    """What `init_process_group` takes: gloo, and the device's library where each rank has a device."""
    if device.type == "cpu" or torch.accelerator.device_count() < num_ranks:
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def _device_type(backend: str) -> str:
    for report in discover_backends():
        if report.name == backend:
            return report.device_type
    raise BackendError(f"no backend {backend!r}")
