"""The HCCL options that are known are those that the vendor's library reads, with its types and lengths."""

from __future__ import annotations

import re

import pytest

from eplb_backends.ascend.hccl_options import KNOWN, HcclOptions
from tests.ascend.wheel import Wheel

HEADER = "third_party/hccl/inc/hccl/hccl_types.h"

FIELDS = {
    "group_name": "hcclUdi",
    "hccl_algo": "hcclAlgo",
    "hccl_buffer_name": "hcclBufferName",
    "hccl_retry_enable": "hcclRetryEnable",
    "hccl_retry_params": "hcclRetryParams",
}
"""Options of text and the array that each fills."""


def test_names_and_types_are_those_of_the_library(wheel: Wheel) -> None:
    """The library names each option, and its type, in the message for a value of another one."""
    messages = re.findall(rb"Value type of (\w+) should be (int|string)", wheel.library)
    assert {name.decode(): kind.decode() for name, kind in messages} == {
        name: "string" if name in FIELDS else "int" for name in KNOWN
    }


@pytest.mark.parametrize("name", FIELDS)
def test_text_is_as_long_as_its_array_holds(wheel: Wheel, name: str) -> None:
    header = wheel.header(HEADER)
    found = re.search(rf"char {FIELDS[name]}\[(\w+)\]", header)
    assert found is not None
    size = re.search(rf"{found.group(1)} = (\d+)", header)
    assert size is not None
    HcclOptions({name: "x" * (int(size.group(1)) - 1)})
    with pytest.raises(ValueError, match=name):
        HcclOptions({name: "x" * int(size.group(1))})


def test_expansion_modes_are_those_of_the_header(wheel: Wheel) -> None:
    comment = re.search(r"uint32_t hcclOpExpansionMode;\s*//(.*)", wheel.header(HEADER))
    assert comment is not None
    for mode in re.findall(r"(\d+):", comment.group(1)):
        HcclOptions({"hccl_op_expansion_mode": int(mode)})
    with pytest.raises(ValueError, match="hccl_op_expansion_mode is 4"):
        HcclOptions({"hccl_op_expansion_mode": len(re.findall(r"(\d+):", comment.group(1)))})


def test_the_longest_execution_timeout_is_the_library_s(wheel: Wheel) -> None:
    assert b"hccl_exec_timeout exceeds INT32_MAX(2147483647)" in wheel.library
    HcclOptions({"hccl_exec_timeout": 2147483647})


def test_options_are_of_the_class_that_a_group_reads(wheel: Wheel) -> None:
    """Options of any other class are replaced by the defaults without a word."""
    helper = (wheel.root / "_init" / "registry" / "distributed.py").read_text(encoding="utf-8")
    assert "pg_options, torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options\n" in helper
    assert re.search(r"std::variant<[^>]*> *> hccl_config;", wheel.header(PROCESS_GROUP))


PROCESS_GROUP = "torch_npu/csrc/distributed/ProcessGroupHCCL.hpp"
