"""What an exchange asks of torch's process groups, in which order; nothing of theirs runs here."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore, Store

from eplb_backends.accelerator.coalescing_group import CoalescingGroup
from eplb_backends.ascend.hccl_group import HcclGroup
from eplb_backends.ascend.hccl_options import HcclOptions
from eplb_backends.cuda import nccl_group
from eplb_backends.cuda.nccl_options import NcclOptions
from eplb_platform.backend import Message


class Library:
    """Of both kinds; raises at the given call."""

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list[object] = []
        self._fails_at = fails_at

    def _start_coalescing(self) -> None:
        self._note("start")

    def _end_coalescing(self) -> Library:
        self._note("end")
        return self

    def synchronize(self) -> None:
        self._note("synchronize")

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._note("send", peer, tensors[0].numel())

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._note("recv", peer, tensors[0].numel())

    def batch_isend_irecv(self, kinds: list[str], tensors: list[torch.Tensor], peers: list[int]) -> Library:
        self._note("batch", kinds, [tensor.numel() for tensor in tensors], peers)
        return self

    def abort(self) -> None:
        self._note("abort")

    def abort_hccl_comm(self, reason: str) -> None:
        self._note("abort")

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if call[0] == self._fails_at:
            raise RuntimeError("failed")


SENDS = [Message(1, torch.zeros(3)), Message(2, torch.zeros(4))]
RECEIVES = [Message(2, torch.zeros(5))]


def test_messages_are_one_batch_that_the_stream_waits_for() -> None:
    library = Library()
    group = CoalescingGroup(library)  # type: ignore[arg-type]
    group.exchange(SENDS, RECEIVES)
    group.abort()
    messages = [("recv", 2, 5), ("send", 1, 3), ("send", 2, 4)]
    assert library.calls == [("start",), *messages, ("end",), ("synchronize",), ("abort",)]


def test_a_batch_that_fails_is_closed() -> None:
    library = Library(fails_at="send")
    with pytest.raises(RuntimeError, match="failed"):
        CoalescingGroup(library).exchange(SENDS, RECEIVES)  # type: ignore[arg-type]
    assert library.calls == [("start",), ("recv", 2, 5), ("send", 1, 3), ("end",)]


def test_hccl_is_given_one_operation() -> None:
    library = Library()
    HcclGroup(library).exchange(SENDS, RECEIVES)  # type: ignore[arg-type]
    kinds = ["isend", "isend", "irecv"]
    assert library.calls == [("batch", kinds, [3, 4, 5], [1, 2, 2]), ("synchronize",)]


def test_torch_has_what_is_called_of_its_groups() -> None:
    from torch._C._distributed_c10d import Backend, Work

    for name in ("_start_coalescing", "_end_coalescing", "send", "recv", "abort"):
        assert callable(getattr(Backend, name))
    assert callable(Work.synchronize)


def test_nccl_options_are_checked() -> None:
    assert NcclOptions({"max_ctas": 4, "is_high_priority_stream": True}).values["max_ctas"] == 4
    with pytest.raises(ValueError, match="no option 'max_cta', the nearest is 'max_ctas'"):
        NcclOptions({"max_cta": 4})
    with pytest.raises(ValueError, match="max_ctas is True, expected an integer from 1 to 64"):
        NcclOptions({"max_ctas": True})
    with pytest.raises(ValueError, match="min_ctas is 8, more than max_ctas 4"):
        NcclOptions({"min_ctas": 8, "max_ctas": 4})
    assert NcclOptions({"min_ctas": 8}).values == {"min_ctas": 8}


@pytest.mark.parametrize("kind", [HcclOptions, NcclOptions])
@pytest.mark.parametrize("given", ["hccl_buffer_size=200", [], ["max_ctas"], 0])
def test_options_are_an_object(kind: type[HcclOptions | NcclOptions], given: object) -> None:
    with pytest.raises(ValueError, match=r"ccl_options is .*, expected an object of options and values"):
        kind(given)  # type: ignore[arg-type]


def test_a_group_of_hccl_has_our_options_and_our_watchdog_s_time_out() -> None:
    """By default that would be torch_npu's own, which may come before ours."""
    groups = SimpleNamespace(ProcessGroupHCCL=SimpleNamespace(Options=SimpleNamespace))
    torch_npu = SimpleNamespace(_C=SimpleNamespace(_distributed_c10d=groups))
    options = HcclOptions({"hccl_buffer_size": 77})
    given = options.to_process_group(torch_npu, timedelta(hours=1))  # type: ignore[arg-type]
    assert vars(given) == {"hccl_config": {"hccl_buffer_size": 77}, "_timeout": timedelta(hours=1)}


class Nccl:
    """What torch makes a group of, where it was built with NCCL."""

    def __init__(self, store: Store, rank: int, num_ranks: int, options: SimpleNamespace) -> None:
        self.options = options

    @staticmethod
    def Options() -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace())


def test_a_group_of_nccl_has_our_options_and_our_watchdog_s_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Nccl, raising=False)
    options = NcclOptions({"max_ctas": 4, "is_high_priority_stream": True})
    group = nccl_group.new_group(HashStore(), 0, 2, options, watchdog_timeout=timedelta(hours=1))
    library = group._library
    assert isinstance(library, Nccl)
    assert vars(library.options) == {
        "config": SimpleNamespace(max_ctas=4),
        "_timeout": timedelta(hours=1),
        "is_high_priority_stream": True,
    }


def test_an_abort_reaches_the_library() -> None:
    for kind in (CoalescingGroup, HcclGroup):
        library = Library()
        kind(library).abort()  # type: ignore[arg-type]
        assert library.calls == [("abort",)]
