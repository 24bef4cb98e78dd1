"""Experts that change places between ranks, on streams that dawdle: what goes wrong, in words.

Each scenario runs on a rank, and gives the faults that it saw: none, unless the backend was mutated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from torch.distributed import Store

from eplb_backends.accelerator import host_transfer, weights
from eplb_backends.accelerator.streams import TorchStreams
from eplb_backends.ascend import AscendBackend, hccl_group, hccl_options, nz_format
from eplb_platform.backend import Message
from tests.ascend.over_stub.hccl_groups import NZ
from tests.ascend.over_stub.recorded import calls_of, of_hccl

SHAPE = (30, 50)
STORED = 2048
"""Elements that a tensor of this shape has in NZ, in halves."""
SLOTS = 3
ROUNDS = 6
DAWDLE_US = 20_000


def mutations() -> Mapping[str, Callable[[], mock._patch[object]]]:
    """Ways to spoil the backend: one wait, one check less."""
    patch = mock.patch.object
    return {
        "": lambda: patch(weights, "__doc__", weights.__doc__),
        "streams wait for no mark": lambda: patch(TorchStreams, "wait", lambda streams, mark: None),
        "rounds wait for no copy": lambda: patch(
            host_transfer.HostTransfer, "_await", lambda transfer, half, deadline: None
        ),
        "checksums wait for no copy": lambda: patch(weights, "wait_on_host", lambda *given: True),
        "the stream does not wait for HCCL": lambda: patch(
            hccl_group.HcclGroup, "exchange", _exchange_without_waiting
        ),
        "views of NZ are taken": lambda: patch(nz_format, "check_whole", lambda tensor: None),
        "stacks in NZ are taken": lambda: patch(nz_format, "check_parameter", lambda parameter: None),
        "formats may differ": lambda: patch(nz_format, "check_same_format", lambda *given: None),
        "options are not looked at": lambda: patch(hccl_options, "_fault", lambda name, value: None),
    }


def _exchange_without_waiting(
    group: hccl_group.HcclGroup, sends: list[Message], receives: list[Message]
) -> None:
    with mock.patch.object(torch.distributed.Work, "synchronize", lambda work: None):
        messages = [*sends, *receives]
        kinds = ["isend"] * len(sends) + ["irecv"] * len(receives)
        peers = [message.peer for message in messages]
        group._library.batch_isend_irecv(kinds, [message.tensor for message in messages], peers)


@contextmanager
def connected(rank: int, num_ranks: int, store: Store, transport: str) -> Iterator[AscendBackend]:
    torch.npu.set_device(rank)
    torch.npu.config.allow_internal_format = True
    backend = AscendBackend(transport=transport, pinned_bytes=num_ranks * 4096)
    backend.connect(store, rank, num_ranks, timeout_s=60.0)
    try:
        backend.warm_up()
        yield backend
    finally:
        dawdle(1, 100)
        backend.close()


def swap(
    rank: int, num_ranks: int, store: Store, layout: str, transport: str, mutation: str = ""
) -> list[str]:
    """Round after round every rank takes the experts of the one before, while its streams are behind."""
    with connected(rank, num_ranks, store, transport) as backend, mutations()[mutation]():
        own = _parameter(layout)
        addresses = [expert.data_ptr() for expert in own]
        faults: list[str] = []
        for number in range(ROUNDS):
            dawdle(number, DAWDLE_US)
            asked = calls_of(
                lambda number=number: faults.extend(_round(backend, own, rank, num_ranks, number))
            )
            counts = {call["count"] for call in of_hccl(asked) if call.get("data_type") == 3}
            if layout == "nz" and transport == "collective" and counts != {STORED}:
                faults.append(f"HCCL was asked for {counts} elements")
        if [expert.data_ptr() for expert in own] != addresses:
            faults.append("weights lie elsewhere")
        return faults


def _round(
    backend: AscendBackend, own: list[torch.Tensor] | torch.Tensor, rank: int, num_ranks: int, number: int
) -> list[str]:
    after, before = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    streams = backend.streams
    for slot in range(SLOTS):
        own[slot].copy_(_like(own, _values(rank, number, slot)))
    written = streams.record()
    with streams.transfer():
        streams.wait(written)
        staging = backend.allocate_staging(own, SLOTS)
        backend.exchange(
            [Message(after, expert) for expert in own], [Message(before, staged) for staged in staging]
        )
        received = streams.record()
    streams.wait(received)
    backend.swap_in(own, range(SLOTS), staging, range(SLOTS))
    sums = backend.checksum(list(own))
    right = [_values(before, number, slot) for slot in range(SLOTS)]
    faults = [
        f"slot {slot} holds something else"
        for slot, expert in enumerate(right)
        if not torch.equal(own[slot].cpu(), expert)
    ]
    plain = torch.stack(right).npu()
    torch.npu.synchronize()
    if backend.checksum(list(plain)) != sums:
        faults.append("the checksum is another one")
    return faults


def refusals(rank: int, num_ranks: int, store: Store, mutation: str = "") -> list[str]:
    """What the backend has to refuse and did not, or in other words."""
    torch.npu.set_device(rank)
    torch.npu.config.allow_internal_format = True
    with mutations()[mutation]():
        backend = AscendBackend()
        weight = _to_nz(_values(0, 0, 0))
        stack = _to_nz(torch.stack([_values(0, 0, slot) for slot in range(SLOTS)]))
        plain = _values(0, 0, 0).npu()
        to_send = backend.layout.to_send
        tried: list[tuple[str, str, Callable[[], object]]] = [
            ("a slice is sent", "no memory of its own", lambda: to_send(backend.streams, weight[16:])),
            (
                "the first rows are sent",
                "no memory of its own",
                lambda: to_send(backend.streams, weight[:16]),
            ),
            ("a stack is staged", "split_stacked", lambda: backend.allocate_staging(stack, 1)),
            ("plain goes into NZ", "ACL format", lambda: backend.swap_in([weight], [0], [plain], [0])),
            ("an option is misspelt", "hccl_buffer_size", lambda: _with_option("hccl_bufer_size", 77)),
            ("an option is too big", "0 to 3", lambda: _with_option("hccl_op_expansion_mode", 4)),
        ]
        return [fault for what, words, action in tried if (fault := _refusal_fault(what, words, action))]


def _refusal_fault(what: str, words: str, action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return "" if words in str(error) else f"{what}: {error}"
    return f"{what}: not refused"


def _with_option(name: str, value: object) -> AscendBackend:
    return AscendBackend(transport="collective", hccl_options={name: value})


def _parameter(layout: str) -> list[torch.Tensor] | torch.Tensor:
    if layout == "stacked":
        return torch.zeros(SLOTS, *SHAPE, dtype=torch.float16, device="npu")
    return [_to_nz(torch.zeros(SHAPE, dtype=torch.float16)) for _ in range(SLOTS)]


def _like(own: list[torch.Tensor] | torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values.npu() if isinstance(own, torch.Tensor) else _to_nz(values)


def _to_nz(values: torch.Tensor) -> torch.Tensor:
    return torch.ops.npu.npu_format_cast(values.npu(), NZ)


def _values(rank: int, number: int, slot: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * rank + 100 * number + slot)
    return torch.randn(SHAPE, generator=generator).half()


def dawdle(seed: int, most_us: int) -> None:
    ctypes.CDLL("libascendcl.so").cann_stub_set_delay(ctypes.c_uint64(seed), ctypes.c_int64(most_us))
