"""Options of the NCCL group, checked."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

from eplb_backends.accelerator.transports import check_is_mapping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupNCCL

_MOST_CTAS = 64

KNOWN: Final[Mapping[str, tuple[type, int, int]]] = {
    "is_high_priority_stream": (bool, 0, 1),
    "min_ctas": (int, 1, _MOST_CTAS),
    "max_ctas": (int, 1, _MOST_CTAS),
    "cga_cluster_size": (int, 0, 16),
}
"""Name -> type, least and most; all but the first are of `ncclConfig_t`. Thread blocks that copy weights are
taken from the model's operations while they run.
"""


class NcclOptions:
    """Checked options of one group. Raises `ValueError` with every fault, one clause each."""

    def __init__(self, options: Mapping[str, object]) -> None:
        check_is_mapping("nccl_options", options)
        faults = [fault for name, value in options.items() if (fault := _fault(name, value)) is not None]
        if not faults and options.get("min_ctas", 0) > options.get("max_ctas", _MOST_CTAS):  # type: ignore[operator]
            faults = [f"min_ctas is {options['min_ctas']}, more than max_ctas {options['max_ctas']}"]
        if faults:
            raise ValueError(f"NCCL options: {'; '.join(faults)}")
        self.values: Final[Mapping[str, object]] = dict(options)

    def apply_to(self, options: ProcessGroupNCCL.Options) -> None:
        """Set them in the options of a group."""
        for name, value in self.values.items():
            owner = options if name == "is_high_priority_stream" else options.config
            setattr(owner, name, value)


def _fault(name: str, value: object) -> str | None:
    if name not in KNOWN:
        nearest = get_close_matches(name, KNOWN, n=1, cutoff=0.0)[0]
        return f"no option {name!r}, the nearest is {nearest!r}"
    kind, least, most = KNOWN[name]
    if isinstance(value, int) and type(value) is kind and least <= value <= most:
        return None
    expected = "true or false" if kind is bool else f"an integer from {least} to {most}"
    return f"{name} is {value!r}, expected {expected}"
