"""NZ weights, over a fake of torch_npu that lays them out in blocks and has torch_npu's traps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_backends.accelerator.weights import DenseLayout
from eplb_backends.ascend import nz_format
from eplb_backends.cpu.streams import SerialStreams
from tests.fake_torch_npu import ND, NZ, FakeTorchNpu, installed, values_of

STREAMS = SerialStreams()
LAYOUT = nz_format.NzLayout()


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorchNpu]:
    with installed(monkeypatch) as fake:
        yield fake


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_storage_and_not_the_number_of_elements_says_what_is_stored(torch_npu: FakeTorchNpu) -> None:
    plain = weights(30, 50)
    nz = torch_npu.npu_format_cast(plain, NZ)
    assert (nz.numel(), nz_format.stored_elements(nz)) == (1500, 2048)
    assert nz_format.stored_elements(plain) == 1500
    assert nz_format.stored_elements(plain[:3]) == 150


@given(rows=st.integers(1, 70), columns=st.integers(1, 70))
def test_bytes_travel_in_the_plain_format_and_land_in_place(rows: int, columns: int) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(patch) as torch_npu:
        plain = weights(rows, columns)
        source, target = (torch_npu.npu_format_cast(tensor, NZ) for tensor in (plain, plain * 2))
        address = target.data_ptr()

        sent = LAYOUT.to_send(STREAMS, source)
        room = LAYOUT.to_fill(target)
        room.copy_(sent)
        LAYOUT.fill(STREAMS, target, room)

        assert torch.equal(sent, octets(plain))
        assert torch.equal(values_of(target), plain)
        assert (target.data_ptr(), torch_npu.get_npu_format(target)) == (address, NZ)


def test_the_shared_layout_would_have_sent_other_bytes(torch_npu: FakeTorchNpu) -> None:
    """So that the test above would notice when NZ tensors were sent as if they were plain."""
    plain = weights(30, 50)
    nz = torch_npu.npu_format_cast(plain, NZ)
    assert not torch.equal(DenseLayout().to_send(STREAMS, nz), octets(plain))


def test_a_plain_tensor_is_never_copied_into_an_nz_one(torch_npu: FakeTorchNpu) -> None:
    """So that the fake's trap is one: what torch_npu leaves is neither the source nor the old values."""
    plain = weights(30, 50)
    nz = torch_npu.npu_format_cast(plain, NZ)
    nz.copy_(plain * 2)
    assert not torch.equal(values_of(nz), plain * 2)


def test_plain_tensors_go_the_shared_way(torch_npu: FakeTorchNpu) -> None:
    stacked, scattered = weights(4, 3, 5), weights(6, 5).T
    assert LAYOUT.to_send(STREAMS, stacked[2]).data_ptr() == stacked[2].data_ptr()
    assert torch.equal(LAYOUT.to_send(STREAMS, scattered), octets(scattered.contiguous()))
    room = LAYOUT.to_fill(scattered)
    room.copy_(octets(scattered.contiguous() * 2))
    expected = scattered.contiguous() * 2
    LAYOUT.fill(STREAMS, scattered, room)
    assert torch.equal(scattered, expected)


def test_no_part_of_an_nz_tensor_is_sent(torch_npu: FakeTorchNpu) -> None:
    stack = torch_npu.npu_format_cast(weights(4, 30, 50), NZ)
    matrix = torch_npu.npu_format_cast(weights(64, 64), NZ)
    for part in (stack[0], stack[2], matrix[:16], matrix[:60], matrix[:, :16], matrix.T):
        for use in (nz_format.check_whole, LAYOUT.to_fill, lambda part: LAYOUT.to_send(STREAMS, part)):
            with pytest.raises(ValueError, match=r"in ACL format 29 is no memory of its own.*one tensor for"):
                use(part)
    nz_format.check_whole(matrix.detach())
    nz_format.check_whole(weights(64, 64)[3:9])


def test_a_part_is_known_without_its_base_too(torch_npu: FakeTorchNpu) -> None:
    with torch.inference_mode():
        stack = torch_npu.npu_format_cast(weights(3, 64, 64), NZ)
        with pytest.raises(ValueError, match="no memory of its own"):
            nz_format.check_whole(stack[0])
        with pytest.raises(ValueError, match="offset 64"):
            nz_format.check_whole(torch_npu.npu_format_cast(weights(64, 64), NZ)[1:])
        nz_format.check_whole(torch_npu.npu_format_cast(weights(64, 64), NZ))


def test_a_stack_is_refused_with_the_way_out_and_its_cost(torch_npu: FakeTorchNpu) -> None:
    stack = torch_npu.npu_format_cast(weights(16, 256, 512), NZ)
    with pytest.raises(ValueError, match=r"\[16, 256, 512\] in ACL format 29.*split_stacked.*8\.2 MiB"):
        nz_format.check_parameter(stack)
    with pytest.raises(ValueError, match="no memory of its own"):
        nz_format.check_parameter(list(stack.unbind(0)))
    nz_format.check_parameter(weights(4, 8, 8))


@pytest.mark.parametrize("acl_format", [NZ, ND])
def test_a_stack_becomes_one_tensor_for_each_expert(torch_npu: FakeTorchNpu, acl_format: int) -> None:
    plain = weights(4, 30, 50)
    experts = nz_format.split_stacked(torch_npu.npu_format_cast(plain, acl_format))
    nz_format.check_parameter(experts)
    assert [torch_npu.get_npu_format(expert) for expert in experts] == [acl_format] * 4
    assert torch.equal(torch.stack([values_of(expert) for expert in experts]), plain)
    assert len({expert.untyped_storage().data_ptr() for expert in experts}) == 4


def test_what_a_conversion_needs() -> None:
    with pytest.MonkeyPatch.context() as patch, installed(patch) as torch_npu:
        plain = weights(4, 30, 50)
        assert nz_format.conversion_bytes(plain) == 4 * 1500 * 2
        nz = torch_npu.npu_format_cast(plain, NZ)
        assert nz_format.conversion_bytes(nz) == (4 * 2048 + 4 * 1500 + 1500) * 2


def test_internal_formats_that_are_switched_off_are_named(torch_npu: FakeTorchNpu) -> None:
    stack, target = (torch_npu.npu_format_cast(weights(*shape), NZ) for shape in ((2, 30, 50), (30, 50)))
    torch_npu.allow_internal_format = False
    for use in (
        lambda: nz_format.split_stacked(stack),
        lambda: LAYOUT.fill(STREAMS, target, LAYOUT.to_fill(target)),
    ):
        with pytest.raises(ValueError, match=r"in ACL format 2 instead of 29: set .*allow_internal_format"):
            use()


def test_weights_that_come_out_of_another_size_are_not_copied(torch_npu: FakeTorchNpu) -> None:
    """As with a type that the model chose when it converted them, and that cannot be read from the tensor."""
    target = torch_npu.npu_format_cast(weights(30, 50), NZ)
    wider = torch_npu.npu_format_cast(weights(30, 70), NZ)
    torch_npu.npu_format_cast = lambda tensor, acl_format: wider  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"received: ACL format 29 with 2560 .* format 29 with 2048"):
        LAYOUT.fill(STREAMS, target, LAYOUT.to_fill(target))
    assert torch.equal(values_of(target), weights(30, 50))


def test_experts_of_one_parameter_have_one_format(torch_npu: FakeTorchNpu) -> None:
    plain = weights(30, 50)
    with pytest.raises(ValueError, match=r"differ in .*\[\(2, 1500\), \(29, 2048\)\]"):
        nz_format.check_parameter([plain, torch_npu.npu_format_cast(plain, NZ)])


def test_tensors_that_lie_differently_in_memory_are_not_copied(torch_npu: FakeTorchNpu) -> None:
    plain = weights(30, 50)
    nz = torch_npu.npu_format_cast(plain, NZ)
    wider = torch_npu.npu_format_cast(weights(30, 70), NZ)
    with pytest.raises(ValueError, match="staging: ACL format 2 with 1500 stored elements does not go into"):
        nz_format.check_same_format(nz, plain, "staging")
    with pytest.raises(ValueError, match=r"format 29 with 2560 stored elements .* format 29 with 2048"):
        nz_format.check_same_format(nz, wider, "staging")
    nz_format.check_same_format(plain, weights(2, 3), "the shared code compares shapes")
