"""What the backends of accelerators share: whatever torch does alike on all of them.

A backend of a device family subclasses `AcceleratorBackend` and names its torch module (`torch.cuda`,
`torch.npu`, `torch.xpu`), its versions, and what of the parts in this folder is different on it.
"""

from eplb_backends.accelerator.backend import AcceleratorBackend
from eplb_backends.accelerator.streams import DeviceModule, TorchStreams

__all__ = ["AcceleratorBackend", "DeviceModule", "TorchStreams"]
