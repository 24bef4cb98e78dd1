"""Options of an HCCL group, checked: ProcessGroupHCCL takes a misspelt one without a word.

Names, types and lengths are those of torch_npu 2.13.0 and of the HcclCommConfig that it fills; a test
compares them with the wheel. The environment variables of HCCL hold where a group has no option of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from types import ModuleType
from typing import Final, TypeAlias

from eplb_backends.accelerator.transports import check_is_mapping

Value: TypeAlias = "int | str"


@dataclass(frozen=True)
class _Whole:
    """An integer within bounds, both included."""

    least: int
    most: int
    unit: str = ""

    def fault(self, value: object) -> str | None:
        if type(value) is int and self.least <= value <= self.most:
            return None
        return f"expected an integer from {self.least} to {self.most}{self.unit and ' ' + self.unit}"


@dataclass(frozen=True)
class _Text:
    """Text shorter than HCCL's array of characters; a longer one would be cut."""

    size: int

    def fault(self, value: object) -> str | None:
        if isinstance(value, str) and 0 < len(value.encode()) < self.size:
            return None
        return f"expected text of 1 to {self.size - 1} bytes"


_EXEC_TIMEOUT = "HCCL_EXEC_TIMEOUT"
_UINT32_NOT_SET = 0xFFFFFFFF  # means "not configured" to HCCL

KNOWN: Final[Mapping[str, _Whole | _Text]] = {
    "group_name": _Text(128),
    "hccl_algo": _Text(1600),
    "hccl_buffer_name": _Text(128),
    "hccl_buffer_size": _Whole(1, _UINT32_NOT_SET - 1, "MB"),
    "hccl_exec_timeout": _Whole(0, 2**31 - 1, "s"),
    "hccl_job_id": _Whole(2**32, 2**64 - 1),  # torch_npu takes a smaller one for a number of 32 bits
    "hccl_op_expansion_mode": _Whole(0, 3, "(default, host, AI CPU, AI vector cores)"),
    "hccl_retry_enable": _Text(50),
    "hccl_retry_params": _Text(128),
    "hccl_sdma_qos": _Whole(0, 7),
    "hccl_sym_win_max_mem_size_per_rank": _Whole(1, 2**64 - 1, "GB"),
    "hccl_world_rank_id": _Whole(0, _UINT32_NOT_SET - 1),
    "qos_service_level": _Whole(0, 7),
    "qos_traffic_class": _Whole(0, 255),
}
"""What may stand in `hccl_config`."""


class HcclOptions:
    """Checked options of one group. Raises `ValueError` with every fault, one clause each."""

    def __init__(self, options: Mapping[str, object]) -> None:
        check_is_mapping("hccl_options", options)
        faults = [fault for name, value in options.items() if (fault := _fault(name, value)) is not None]
        if faults:
            raise ValueError(f"HCCL options: {'; '.join(faults)}")
        self.values: Final[Mapping[str, Value]] = {
            name: value for name, value in options.items() if isinstance(value, int | str)
        }

    def to_process_group(self, torch_npu: ModuleType, watchdog_timeout: timedelta) -> object:
        """The `pg_options` of a group that has these options, and whose watchdog has this time-out."""
        options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
        options.hccl_config = dict(self.values)
        options._timeout = watchdog_timeout
        return options


def check_outlasts(options: HcclOptions, timeout_s: float) -> None:
    """Raise `ValueError` where HCCL's time-out of an operation is not longer than `timeout_s`, which is ours.

    The watchdog of torch_npu ends the process when HCCL gives up. 0 is no time-out to HCCL.
    """
    given = options.values.get("hccl_exec_timeout", os.environ.get(_EXEC_TIMEOUT, ""))
    name = "hccl_exec_timeout" if "hccl_exec_timeout" in options.values else _EXEC_TIMEOUT
    if str(given).isdecimal() and 0 < int(given) <= timeout_s:
        raise ValueError(
            f"{name} is {given} s, not more than the balancer's own time-out of {timeout_s:g} s: torch_npu "
            "would end the process before a late transfer is given up; raise it, or lower transfer_timeout_s"
        )


def _fault(name: str, value: object) -> str | None:
    if name not in KNOWN:
        nearest = get_close_matches(name, KNOWN, n=1, cutoff=0.0)[0]
        return f"no option {name!r}, the nearest is {nearest!r}"
    fault = KNOWN[name].fault(value)
    if fault is None and name == "qos_traffic_class" and int(str(value)) % 4:
        fault = "expected a multiple of 4"
    return None if fault is None else f"{name} is {value!r}, {fault}"
