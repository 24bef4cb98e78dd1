"""What accelerators share, as far as host memory can show it: the rule of replicas, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_backends.accelerator import host_transfer, nixl_library, routing
from eplb_backends.accelerator.host_transfer import HostTransfer
from eplb_backends.accelerator.streams import CaptureError, EventTimer, TorchStreams, wait_on_host
from eplb_backends.accelerator.weights import DenseLayout
from eplb_backends.cpu.mapping import map_and_record as map_on_cpu
from eplb_backends.cpu.streams import SerialStreams
from eplb_backends.cuda import CudaBackend
from eplb_platform.backend import GroupError, Message, StreamOperations
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams
from tests.fake_device import FakeModule, FakeStream


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 40),
    replicas=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    offset=st.integers(0, 2**20),
    table_type=st.sampled_from([torch.int32, torch.int64]),
    id_type=st.sampled_from([torch.int32, torch.int64]),
    load_type=st.sampled_from([torch.int32, torch.int64, None]),
)
def test_tokens_go_where_the_cpu_backend_sends_them(
    seed: int,
    tokens: int,
    replicas: list[int],
    offset: int,
    table_type: torch.dtype,
    id_type: torch.dtype,
    load_type: torch.dtype | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_physical = sum(replicas)
    physical = torch.randperm(num_physical, generator=generator)
    table = torch.full((len(replicas), 7), -1, dtype=table_type)
    for expert, places in enumerate(physical.split(replicas)):
        table[expert, : len(places)] = places.to(table_type)
    counts = torch.tensor(replicas, dtype=table_type)
    ids = torch.randint(-1, len(replicas), (tokens, 3), generator=generator).to(id_type)
    loads = [None if load_type is None else torch.full((num_physical,), 7, dtype=load_type) for _ in range(2)]

    expected = map_on_cpu(ids, table, counts, loads[0], offset)
    actual = routing.map_and_record(ids, table, counts, loads[1], offset)

    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)
    if loads[0] is not None and loads[1] is not None:
        assert torch.equal(*loads)  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [-2, 2])
def test_an_id_that_is_no_expert_is_an_error_of_the_device(wrong: int) -> None:
    table, counts = torch.tensor([[0], [1]]), torch.ones(2, dtype=torch.int64)
    with pytest.raises((RuntimeError, IndexError)):
        routing.map_and_record(torch.tensor([[0], [wrong]]), table, counts, None)


def test_a_load_that_counts_too_few_experts_is_an_error_of_the_device() -> None:
    table, counts = torch.tensor([[0], [1]]), torch.ones(2, dtype=torch.int64)
    with pytest.raises((RuntimeError, IndexError)):
        routing.map_and_record(torch.tensor([[1]]), table, counts, torch.zeros(1, dtype=torch.int64))


def test_shapes_and_types_are_checked() -> None:
    table, counts = torch.tensor([[0], [1]]), torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="logical_ids"):
        routing.map_and_record(torch.tensor([0]), table, counts, None)
    with pytest.raises(ValueError, match="float32"):
        routing.map_and_record(torch.tensor([[0]]), table, counts, torch.zeros(2))


def test_a_way_for_weights_that_is_not_there_is_refused_in_one_line() -> None:
    if not nixl_library.is_installed():
        with pytest.raises(ValueError, match="cuda: transport 'nixl' needs NIXL, which is not installed"):
            CudaBackend(transport="nixl")
    with pytest.raises(ValueError, match="cuda: torch has no collective library here for transport 'coll"):
        CudaBackend(transport="collective")


def test_a_folder_that_is_called_nixl_is_not_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if nixl_library.is_installed():
        pytest.skip("NIXL is installed")
    (tmp_path / "nixl").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not nixl_library.is_installed()
    assert nixl_library.versions() == {}


def test_an_unknown_way_for_weights_is_refused_with_the_nearest_that_is_known() -> None:
    with pytest.raises(ValueError, match="no transport 'colective', the nearest is 'collective'; there are"):
        CudaBackend(transport="colective")
    for wrong in (None, 3, ["host"]):
        with pytest.raises(ValueError, match=r"no transport .*; there are auto, host"):
            CudaBackend(transport=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["64MB", True, 0, -1, 1e6])
def test_pinned_bytes_are_a_number_of_bytes(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"cuda: pinned_bytes is .*, expected an integer from 1"):
        CudaBackend(SerialStreams(), pinned_bytes=wrong)  # type: ignore[arg-type]


# --- torch's streams, over a module that notes what is asked of it ---


def test_a_mark_is_recorded_on_the_stream_that_is_current() -> None:
    module = FakeModule()
    streams = TorchStreams(module)
    forward = streams.record()
    with streams.transfer():
        transfer = streams.record()
        streams.wait(forward)
    streams.wait(transfer)
    assert module.log == [
        "record 0 on current",
        "record 1 on made on device 3",
        "made on device 3 waits for 0",
        "current waits for 1",
    ]
    assert module.devices == [3, 0]  # entered and left again: threads start on device 0


def test_an_event_that_was_never_recorded_is_no_mark() -> None:
    module = FakeModule()
    streams = TorchStreams(module)
    event = module.Event()
    assert event.query()  # as torch's: nothing is pending
    for use in (streams.passed, streams.wait):
        with pytest.raises(TypeError, match="expected a mark that record"):
            use(event)


def test_a_mark_has_passed_once_the_device_says_so() -> None:
    module = FakeModule()
    streams = TorchStreams(module)
    mark = streams.record()
    assert not streams.passed(mark)
    assert not wait_on_host(streams, mark, time.monotonic() + 0.01)
    module.finish()
    assert wait_on_host(streams, mark, time.monotonic())


def test_nothing_is_recorded_while_a_graph_is_captured() -> None:
    module = FakeModule()
    streams, timer = TorchStreams(module), EventTimer(module)
    module.is_capturing = True
    for use in (streams.record, streams.check_not_capturing, timer.start, timer.stop):
        with pytest.raises(CaptureError, match="being captured"):
            use()
    assert module.log == []


def test_host_memory_that_is_not_pinned_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("pinned memory is there")
    with pytest.raises(ValueError, match="12 bytes of host memory are not pinned"):
        TorchStreams(FakeModule()).copy(torch.zeros(3), torch.zeros(3))


class DeviceTensor:
    """What a stream does with a tensor on a device, noted."""

    device = SimpleNamespace(type="fake")

    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log

    def record_stream(self, stream: FakeStream) -> None:
        self._log.append(f"{self._name} is kept for {stream.name}")

    def copy_(self, source: DeviceTensor, non_blocking: bool = False) -> None:
        self._log.append(f"{self._name} <- {source._name}" + " without a wait" * non_blocking)


def test_a_copy_keeps_both_tensors_for_its_stream_and_holds_up_no_thread() -> None:
    module = FakeModule()
    streams, target, source = (
        TorchStreams(module),
        DeviceTensor("target", module.log),
        DeviceTensor("source", module.log),
    )
    with streams.transfer():
        streams.copy(target, source)  # type: ignore[arg-type]
    streams.keep(source)  # type: ignore[arg-type]
    assert module.log == [
        "target is kept for made on device 3",
        "source is kept for made on device 3",
        "target <- source without a wait",
        "source is kept for current",
    ]


def test_a_timer_knows_nothing_before_both_events_have_passed() -> None:
    module = FakeModule()
    timer = EventTimer(module)
    assert timer.elapsed_ms() is None
    timer.start()
    module.finish()
    assert timer.elapsed_ms() is None
    timer.stop()
    assert timer.elapsed_ms() is None
    module.finish()
    assert timer.elapsed_ms() == 2.5
    timer.start()
    module.finish()
    assert timer.elapsed_ms() is None  # the stop before is of no use any more


# --- the way through host memory, where something is wrong ---


class LostGroup:
    """Nobody is there; what would be sent is noted."""

    is_closed = False

    def __init__(self) -> None:
        self.sent = 0

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], timeout_s: float) -> None:
        self.sent += len(sends)


class StuckStreams(SerialStreams):
    """A device that has stopped."""

    def passed(self, mark: object) -> bool:
        return False


def transfer_over(streams: StreamOperations, pinned_bytes: int = 1 << 10) -> HostTransfer:
    return HostTransfer(
        streams, DenseLayout(),
        device_type="cpu", rank=0, num_ranks=3, pinned_bytes=pinned_bytes,
        allocate=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
    )  # fmt: skip


def test_a_device_that_has_stopped_ends_an_exchange_by_its_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_transfer, "_QUIET_S", 0.05)
    group = LostGroup()
    started = time.monotonic()
    with pytest.raises(GroupError, match="rank 0: exchange: the device did not copy to host memory in time"):
        transfer_over(StuckStreams()).exchange(group, [Message(1, torch.ones(3))], [], timeout_s=0.1)
    assert time.monotonic() - started < 60
    assert group.sent == 0


def test_a_group_that_closed_meanwhile_fills_no_tensor() -> None:
    group, received = LostGroup(), torch.zeros(3)

    def close(*arguments: object) -> None:
        group.is_closed = True

    group.exchange = close  # type: ignore[method-assign]
    with pytest.raises(GroupError, match="the group was closed on this rank"):
        transfer_over(SerialStreams()).exchange(group, [], [Message(2, received)], timeout_s=1.0)
    assert received.tolist() == [0, 0, 0]


class ClosingGroup(LostGroup):
    """Closed by another thread once it was asked so many times; what it brings are sevens."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._looks = looks

    @property
    def is_closed(self) -> bool:  # type: ignore[override]
        self._looks -= 1
        return self._looks < 0

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], timeout_s: float) -> None:
        for message in receives:
            message.tensor.fill_(7)


def test_a_group_that_closes_behind_the_last_round_fills_no_scattered_tensor() -> None:
    received = torch.zeros(2, 3, dtype=torch.uint8).t()
    with pytest.raises(GroupError, match="the group was closed on this rank"):
        transfer_over(SerialStreams()).exchange(ClosingGroup(1), [], [Message(2, received)], timeout_s=1.0)
    assert not received.any()


def test_an_exchange_of_nothing_still_asks_the_group() -> None:
    group = LostGroup()

    def refuse(*arguments: object) -> None:
        raise GroupError("closed")

    group.exchange = refuse  # type: ignore[method-assign]
    with pytest.raises(GroupError, match="closed"):
        transfer_over(SerialStreams()).exchange(group, [], [], timeout_s=1.0)


@pytest.mark.parametrize("is_scattered", [False, True])
def test_what_is_still_on_its_way_has_arrived_when_an_abort_returns(is_scattered: bool) -> None:
    for seed in range(60):
        streams = SimulatedStreams(SimulatedDevice(seed))
        received = torch.zeros(2, 3, dtype=torch.uint8)
        received = received.t() if is_scattered else received
        way = transfer_over(streams)
        with streams.transfer():
            way.exchange(ClosingGroup(9), [], [Message(2, received)], timeout_s=5.0)
        way.stop()
        assert received.eq(7).all(), f"seed {seed}"


@pytest.mark.parametrize("peer", [0, 3])
def test_only_other_ranks_are_peers(peer: int) -> None:
    with pytest.raises(ValueError, match=rf"rank 0: a message has peer {peer}; expected .* \[1, 2\]"):
        transfer_over(SerialStreams()).exchange(LostGroup(), [Message(peer, torch.ones(1))], [], 1.0)


def test_a_tensor_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="the tensor for rank 1 is on meta, expected cpu"):
        transfer_over(SerialStreams()).exchange(
            LostGroup(), [Message(1, torch.ones(1, device="meta"))], [], 1.0
        )


def test_pinned_memory_holds_at_least_a_byte_for_each_peer() -> None:
    with pytest.raises(ValueError, match="7 bytes of pinned memory are too few for 3 ranks"):
        transfer_over(SerialStreams(), pinned_bytes=7)
