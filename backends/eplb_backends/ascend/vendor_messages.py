"""What the vendor's libraries say when they fail, in one line with what to do about it."""

from __future__ import annotations

import re
from typing import Final

_NO_MEMORY = (
    "the device has no memory left: make staging_memory_mb, hccl_buffer_size or the model's share smaller"
)

ADVICE: Final = {
    "EI0001": "an environment variable of HCCL has a value that it does not take",
    "EI0002": "a rank waited too long for another: look for a rank that failed or never came, before raising "
    "HCCL_EXEC_TIMEOUT",
    "EI0003": "HCCL does not take these arguments: compare hccl_options with what this CANN knows",
    "EI0004": "check the ranks and the rank table that HCCL was given",
    "EI0005": "the ranks called different operations: all need the same version, configuration and order",
    "EI0006": "ranks could not be reached: check that all have started, the network between the devices "
    "(HCCL_IF_IP, HCCL_SOCKET_IFNAME), then HCCL_CONNECT_TIMEOUT",
    "EI0007": "the device has no more of a resource that HCCL needs: end other processes on it",
    "EJ0001": "another process uses HCCL on this device, or one was killed a moment ago: end it, or wait",
    "EL0004": _NO_MEMORY,
    "NPU out of memory": _NO_MEMORY,
}
"""By what stands in the vendor's message: mostly the code in front of it."""

_SAYS_WHY = re.compile(r"\bE[A-Z]\d{4}\b|NPU out of memory")


def explained(error: BaseException) -> str:
    """One line: the vendor's own message if there is one, and advice for it, before what torch_npu says."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if _SAYS_WHY.search(line)), "")
    advice = next((advice for sign, advice in ADVICE.items() if sign in said), "")
    rest = " ".join(line for line in lines if line != said)
    return "; ".join(part for part in (said, advice, f"torch_npu: {rest}" if said and rest else rest) if part)
