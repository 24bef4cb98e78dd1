"""The Ascend backend over a fake of torch_npu: what it adds to the code that accelerators share."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from eplb_backends.ascend import AscendBackend, update_expert, vendor_messages
from eplb_backends.ascend.coupled_parameters import check_moved_together
from eplb_backends.ascend.hccl_options import KNOWN, HcclOptions, check_outlasts
from eplb_backends.ascend.token_counts import add_to_load, counts_of
from eplb_backends.cpu import CpuBackend
from eplb_backends.cpu.streams import SerialStreams
from tests.fake_torch_npu import NZ, FakeTorchNpu, installed, values_of


class HostAscend(AscendBackend):
    """On tensors in host memory, where nothing is pinned."""

    device_type: ClassVar[str] = "cpu"

    def allocate_on_host(self, shape: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)  # type: ignore[arg-type]


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorchNpu]:
    with installed(monkeypatch) as fake:
        yield fake


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()


# --- staging, swap, checksum ---


def test_nz_experts_are_swapped_in_place(torch_npu: FakeTorchNpu) -> None:
    backend = HostAscend(SerialStreams())
    new = weights(30, 50)
    experts = [torch_npu.npu_format_cast(new * factor, NZ) for factor in (2, 3, 4)]
    staging = backend.allocate_staging(experts, 2)
    assert [torch_npu.get_npu_format(staged) for staged in staging] == [NZ, NZ]
    staging[1].copy_(torch_npu.npu_format_cast(new, NZ))
    addresses = [expert.data_ptr() for expert in experts]

    backend.swap_in(experts, [2], staging, [1])

    assert [expert.data_ptr() for expert in experts] == addresses
    for expert, values in zip(experts, (new * 2, new * 3, new), strict=True):
        assert torch.equal(values_of(expert), values)


def test_a_stack_in_nz_has_no_staging(torch_npu: FakeTorchNpu) -> None:
    stack = torch_npu.npu_format_cast(weights(4, 30, 50), NZ)
    with pytest.raises(ValueError, match="split_stacked"):
        HostAscend(SerialStreams()).allocate_staging(stack, 2)


def test_staging_without_internal_formats_is_refused(torch_npu: FakeTorchNpu) -> None:
    experts = [torch_npu.npu_format_cast(weights(30, 50), NZ)]
    torch_npu.allow_internal_format = False
    with pytest.raises(ValueError, match=r"staging: ACL format 2 .*allow_internal_format off"):
        HostAscend(SerialStreams()).allocate_staging(experts, 1)


def test_weights_that_were_converted_after_start_are_not_overwritten(torch_npu: FakeTorchNpu) -> None:
    backend = HostAscend(SerialStreams())
    staging = backend.allocate_staging([weights(30, 50)], 1)
    converted = torch_npu.npu_format_cast(weights(30, 50), NZ)
    with pytest.raises(ValueError, match=r"slot 0: ACL format 2 .* converted after start"):
        backend.swap_in([converted], [0], staging, [0])
    assert torch.equal(values_of(converted), weights(30, 50))


def test_staging_in_a_format_of_the_device_does_not_go_into_plain_weights(torch_npu: FakeTorchNpu) -> None:
    backend = HostAscend(SerialStreams())
    staging = backend.allocate_staging([torch_npu.npu_format_cast(weights(30, 50), NZ)], 1)
    with pytest.raises(ValueError, match=r"slot 0: ACL format 29 .* into format 2 "):
        backend.swap_in([weights(30, 50)], [0], staging, [0])


def test_the_checksum_is_that_of_the_plain_weights_on_any_device(torch_npu: FakeTorchNpu) -> None:
    plain, scale = weights(30, 50), weights(50)
    nz = torch_npu.npu_format_cast(plain, NZ)
    expected = CpuBackend().checksum([plain, scale])
    assert HostAscend(SerialStreams()).checksum([nz, scale]) == expected
    assert HostAscend(SerialStreams()).checksum([nz, scale * 2]) != expected


# --- options ---


def test_a_misspelt_hccl_option_names_the_nearest(torch_npu: FakeTorchNpu) -> None:
    with pytest.raises(ValueError, match="no option 'hccl_bufer_size', the nearest is 'hccl_buffer_size'"):
        AscendBackend(SerialStreams(), hccl_options={"hccl_bufer_size": 100})
    for name in KNOWN:
        with pytest.raises(ValueError, match=f"the nearest is '{name}'"):
            HcclOptions({name[:-1]: 1})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hccl_buffer_size", 0, "hccl_buffer_size is 0, expected an integer from 1 to"),
        ("hccl_buffer_size", "100", "is '100', expected an integer"),
        ("hccl_buffer_size", True, "is True, expected an integer"),
        ("hccl_buffer_size", 2**32 - 1, "from 1 to 4294967294 MB"),
        ("hccl_op_expansion_mode", 4, "is 4, expected an integer from 0 to 3"),
        ("hccl_op_expansion_mode", "AIV", "is 'AIV', expected an integer"),
        ("hccl_exec_timeout", 2**31, "from 0 to 2147483647 s"),
        ("qos_traffic_class", 6, "qos_traffic_class is 6, expected a multiple of 4"),
        ("qos_traffic_class", 256, "from 0 to 255"),
        ("qos_service_level", 8, "from 0 to 7"),
        ("hccl_sdma_qos", 8, "from 0 to 7"),
        ("hccl_world_rank_id", 2**32 - 1, "from 0 to 4294967294"),
        ("hccl_job_id", 2**32 - 1, "from 4294967296 to"),
        ("hccl_algo", "", "expected text of 1 to 1599 bytes"),
        ("hccl_retry_enable", "L1:0, " * 9, "expected text of 1 to 49 bytes"),
        ("group_name", 5, "group_name is 5, expected text"),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        HcclOptions({name: value})


def test_every_fault_of_the_options_is_named() -> None:
    with pytest.raises(ValueError, match=r"hccl_buffer_size is 0.*; no option 'qos'.*"):
        HcclOptions({"hccl_buffer_size": 0, "hccl_algo": "level0:NA", "qos": 1})


def test_our_time_out_comes_before_that_of_hccl() -> None:
    with pytest.raises(ValueError, match=r"hccl_exec_timeout is 30 s, not more than .* 30 s"):
        check_outlasts(HcclOptions({"hccl_exec_timeout": 30}), 30.0)
    for enough in (31, 0):  # 0 is none
        check_outlasts(HcclOptions({"hccl_exec_timeout": enough}), 30.0)


def test_options_that_would_do_nothing_are_refused(torch_npu: FakeTorchNpu) -> None:
    with pytest.raises(ValueError, match="hccl_buffer_size would have no effect: transport 'host'"):
        AscendBackend(SerialStreams(), hccl_options={"hccl_buffer_size": 100})


def test_an_unknown_routing_is_refused(torch_npu: FakeTorchNpu) -> None:
    with pytest.raises(ValueError, match="no routing 'npu'; there are torch, operator"):
        AscendBackend(SerialStreams(), routing="npu")


# --- heat ---


def test_both_kinds_of_group_lists_give_the_same_counts() -> None:
    counts = torch.tensor([3, 0, 5, 1])
    for dtype in (torch.int32, torch.int64):
        assert counts_of(counts.to(dtype), 1).tolist() == [3, 0, 5, 1]
        assert counts_of(counts.cumsum(0).to(dtype), 0).tolist() == [3, 0, 5, 1]
        assert counts_of(counts.to(dtype), 1).dtype == torch.int64
    assert counts_of(counts[:0], 0).tolist() == []


def test_counts_are_added_at_the_slots_of_the_rank() -> None:
    for dtype in (torch.int32, torch.int64):
        load = torch.full((8,), 10, dtype=dtype)
        address = load.data_ptr()
        add_to_load(load, torch.tensor([3, 3, 8]), 0, first_slot=4)
        assert load.tolist() == [10, 10, 10, 10, 13, 10, 15, 10]
        assert load.data_ptr() == address


@pytest.mark.parametrize(
    ("group_list", "kind", "first_slot", "expected"),
    [
        (torch.zeros(2, dtype=torch.int64), 2, 0, "group_list_type must be 0 .* got 2"),
        (torch.zeros(2, 2, dtype=torch.int64), 1, 0, r"\[slots\], got torch.int64 \[2, 2\]"),
        (torch.zeros(2), 1, 0, "got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), 1, 3, "slots 3 to 4 do not lie in a load of 4 experts"),
        (torch.zeros(2, dtype=torch.int64), 1, -1, "slots -1 to 0"),
    ],
)
def test_a_group_list_that_cannot_be_read_is_refused(
    group_list: torch.Tensor, kind: int, first_slot: int, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        add_to_load(torch.zeros(4, dtype=torch.int64), group_list, kind, first_slot=first_slot)


# --- parameters that belong together ---


def w8a8() -> dict[str, list[torch.Tensor] | torch.Tensor]:
    return {
        "gate": weights(8, 16),
        "w13_weight_list": [torch.zeros(16, 32, dtype=torch.int8) for _ in range(4)],
        "w2_weight_list": [torch.zeros(32, 16, dtype=torch.int8) for _ in range(4)],
        "w13_weight_scale_fp32_list": [torch.zeros(32) for _ in range(4)],
        "w2_weight_scale": torch.zeros(4, 16),
        "w2_weight_offset": torch.zeros(4, 16, dtype=torch.int8),
    }


def test_all_parameters_of_the_experts_may_move() -> None:
    check_moved_together(w8a8(), [name for name in w8a8() if name != "gate"], slots=4)
    check_moved_together(w8a8(), [], slots=4)
    check_moved_together({"w13_weight": weights(4, 8, 8)}, ["w13_weight"], slots=4)


@pytest.mark.parametrize("left", ["w13_weight_scale_fp32_list", "w2_weight_offset", "w2_weight_list"])
def test_no_parameter_of_an_expert_stays_behind(left: str) -> None:
    moved = [name for name in w8a8() if name not in ("gate", left)]
    with pytest.raises(ValueError, match=f"^{left} would stay where they are .* move together"):
        check_moved_together(w8a8(), moved, slots=4)


def test_quantised_weights_do_not_move_without_a_scale() -> None:
    layer = {name: tensors for name, tensors in w8a8().items() if "w2_weight_" not in name}
    layer["w2_weight_list"] = w8a8()["w2_weight_list"]
    moved = [name for name in layer if name != "gate"]
    with pytest.raises(ValueError, match=r"^w2_weight_list: quantised, and no scale moves with it"):
        check_moved_together(layer, moved, slots=4)


def test_what_no_expert_owns_does_not_move() -> None:
    with pytest.raises(ValueError, match="gate: not one tensor for each of 4 experts"):
        check_moved_together(w8a8(), ["gate"], slots=4)
    with pytest.raises(ValueError, match="the layer has no w3; it has gate, w13"):
        check_moved_together(w8a8(), ["w3"], slots=4)


# --- routing by the operator ---


def documented(
    ids: torch.Tensor, table: torch.Tensor, *, balance_mode: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_moe_update_expert with balance_mode 1, as its documentation and its example have it."""
    assert (balance_mode, table.dtype, table.is_contiguous()) == (1, torch.int32, True)
    mapped = ids.clone()
    for row, chosen in enumerate(ids.tolist()):
        for column, expert in enumerate(chosen):
            mapped[row, column] = table[expert, 1 + row % int(table[expert, 0])]
    return mapped, torch.empty(0)


def one_too_early(
    ids: torch.Tensor, table: torch.Tensor, *, balance_mode: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, as the pseudo-code beside that example has it, which can return the number of replicas."""
    rows = torch.arange(len(ids))[:, None]
    return table[ids, (rows % table[ids, 0]).long()].long(), torch.empty(0)


def not_there(
    ids: torch.Tensor, table: torch.Tensor, *, balance_mode: int
) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("aclnnMoeUpdateExpert or aclnnMoeUpdateExpertGetWorkspaceSize not in libopapi.so")


TABLE = torch.tensor([[4, -1, -1], [1, 3, -1], [0, 2, 5]], dtype=torch.int32)
COUNTS = torch.tensor([1, 2, 3], dtype=torch.int32)


def test_the_operator_chooses_by_row_and_offset_and_is_counted() -> None:
    ids = torch.tensor([[0, 1], [1, 2], [-1, 2], [2, -1]])
    load = torch.zeros(6, dtype=torch.int64)
    for offset in range(7):
        mapped = update_expert.map_and_record(documented, ids, TABLE, COUNTS, load, offset)
        for row, chosen in enumerate(ids.tolist()):
            for column, expert in enumerate(chosen):
                place = (row + offset) % int(COUNTS[expert])
                expected = -1 if expert == -1 else int(TABLE[expert, place])
                assert int(mapped[row, column]) == expected
    assert int(load.sum()) == 7 * 6
    assert mapped.dtype == torch.int64


@pytest.mark.parametrize(
    ("operator", "is_right"), [(documented, True), (one_too_early, False), (not_there, False)]
)
def test_the_operator_is_asked_once_whether_it_is_right(
    operator: update_expert.UpdateExpert, is_right: bool
) -> None:
    assert update_expert.answers_as_documented(operator, torch.device("cpu")) is is_right


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_logical", "width", "fits"),
    [
        (512, 16, 1023, 8, True),
        (513, 8, 256, 4, False),
        (0, 8, 256, 4, False),
        (8, 17, 256, 4, False),
        (8, 8, 4, 4, False),
        (8, 8, 1024, 4, False),
        (8, 8, 256, 9, False),
    ],
)
def test_the_operator_gets_no_shapes_that_it_does_not_take(
    tokens: int, top_k: int, num_logical: int, width: int, fits: bool
) -> None:
    ids = torch.zeros(tokens, top_k, dtype=torch.int64)
    assert update_expert.can_map(ids, torch.zeros(num_logical, width), num_ranks=8) is fits


def test_other_shapes_go_by_the_shared_rule(torch_npu: FakeTorchNpu) -> None:
    backend = HostAscend(SerialStreams())
    backend._update_expert = not_there
    ids = torch.arange(600 * 2).view(600, 2) % 3
    expected = CpuBackend().map_and_record(ids, TABLE, COUNTS, None, 5)
    assert torch.equal(backend.map_and_record(ids, TABLE, COUNTS, None, 5), expected)


def test_a_torch_npu_without_the_operator_is_said_once(
    torch_npu: FakeTorchNpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("eplb_backends.ascend.environment.torch_npu", lambda: torch_npu)
    with caplog.at_level(logging.WARNING):
        backend = HostAscend(SerialStreams(), routing="operator")
    assert [record.message for record in caplog.records] == [
        "torch_npu has no npu_moe_update_expert: routing by torch's operators"
    ]
    expected = CpuBackend().map_and_record(torch.tensor([[2]]), TABLE, COUNTS, None)
    assert torch.equal(backend.map_and_record(torch.tensor([[2]]), TABLE, COUNTS, None), expected)


def test_the_vendor_s_words_come_first_with_advice() -> None:
    """As torch_npu gives them: its own sentence, then the message of CANN in a line of its own."""
    raised = RuntimeError(
        "hcclCommInitRootInfoConfig:HCCLUtils.cpp:10 HCCL function error: error code is 9\n"
        "[ERROR] 2026 ERR02200 DIST call hccl api failed.\nEI0006: Getting socket times out.\n"
    )
    text = vendor_messages.explained(raised)
    assert text.startswith("EI0006: Getting socket times out.; ranks could not be reached: check that all")
    assert text.endswith(
        "torch_npu: hcclCommInitRootInfoConfig:HCCLUtils.cpp:10 HCCL function error: error "
        "code is 9 [ERROR] 2026 ERR02200 DIST call hccl api failed."
    )
    assert (
        vendor_messages.explained(RuntimeError("EZ9999: inner\nerror")) == "EZ9999: inner; torch_npu: error"
    )
    assert vendor_messages.explained(RuntimeError("something\nelse")) == "something else"
    full = vendor_messages.explained(RuntimeError("NPU out of memory. Tried to allocate 1 GiB."))
    assert full.startswith("NPU out of memory. Tried to allocate 1 GiB.; the device has no memory left: make")
