"""The CPU backend in one process: mapping, weights, a group of one rank, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from textwrap import dedent

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import TCPStore

from eplb_backends.cpu import CpuBackend, kernels
from eplb_platform.backend import GroupError, Message
from eplb_platform.testing.faults import with_fault


@pytest.fixture
def backend() -> CpuBackend:
    return CpuBackend()


@pytest.fixture
def alone() -> Iterator[CpuBackend]:
    """Connected, as the only rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    backend = CpuBackend()
    backend.connect(store, 0, 1, 30.0)
    yield backend
    backend.close()


def one_expert(replicas: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(replicas).unsqueeze(0), torch.tensor([replicas])


# --- mapping ---


@given(
    replicas=st.integers(1, 64),
    tokens=st.integers(0, 5000),
    stride=st.integers(1, 12),
    offset=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_replicas_share_evenly(replicas: int, tokens: int, stride: int, offset: int) -> None:
    """No replica is ever more than ten tokens off its share, whatever the number of tokens."""
    ids = torch.full((tokens * stride, 1), -1)
    ids[::stride] = 0
    load = torch.zeros(replicas, dtype=torch.int64)
    CpuBackend().map_and_record(ids, *one_expert(replicas), load, offset)
    assert int(load.sum()) == tokens
    assert float((load - tokens / replicas).abs().max()) <= 10


def test_consecutive_rows_are_within_two_tokens_of_even() -> None:
    for replicas in (2, 3, 5, 8, 32):
        load = torch.zeros(replicas, dtype=torch.int64)
        ids = torch.zeros(4096, 1, dtype=torch.int64)
        CpuBackend().map_and_record(ids, *one_expert(replicas), load, offset=17)
        assert float((load - 4096 / replicas).abs().max()) <= 2


@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64, torch.int16])
@pytest.mark.parametrize("table_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("count_type", [torch.int32, torch.int64])
def test_every_integer_type_gives_the_same_ids(
    backend: CpuBackend, ids_type: torch.dtype, table_type: torch.dtype, count_type: torch.dtype
) -> None:
    ids = torch.tensor([[0, 1], [2, -1], [1, 2]])
    table, count = torch.tensor([[3, -1], [0, 4], [1, 2]]), torch.tensor([1, 2, 2])
    expected = backend.map_and_record(ids, table, count, None)
    load = torch.zeros(5, dtype=torch.int64)
    physical = backend.map_and_record(ids.to(ids_type), table.to(table_type), count.to(count_type), load)
    assert torch.equal(physical, expected)
    assert torch.equal(load, torch.bincount(expected[expected >= 0], minlength=5))


def test_an_engine_may_count_in_int32(backend: CpuBackend) -> None:
    table, count = torch.tensor([[3, -1], [0, 4]]), torch.tensor([1, 2])
    load = torch.zeros(5, dtype=torch.int32)
    physical = backend.map_and_record(torch.tensor([[0, 1], [1, -1]]), table, count, load)
    assert torch.equal(load.long(), torch.bincount(physical[physical >= 0], minlength=5))


def test_ids_that_do_not_lie_together_are_read_right(backend: CpuBackend) -> None:
    table, count = torch.tensor([[3], [0], [1], [2]]), torch.ones(4, dtype=torch.int64)
    ids = torch.tensor([[0, 9, 1, 9], [2, 9, 3, 9]])[:, ::2].t()
    assert backend.map_and_record(ids, table, count, None).tolist() == [[3, 1], [0, 2]]


def test_nothing_is_compiled_after_warm_up(backend: CpuBackend) -> None:
    kernels.warm()
    signatures = getattr(kernels.map_ids, "signatures", None)
    if signatures is None:
        pytest.skip("the compiler is disabled")
    before = len(signatures)
    for ids_type in (torch.int32, torch.int64):
        for table_type in (torch.int32, torch.int64):
            for load in (None, torch.zeros(3, dtype=torch.int64)):
                ids = torch.zeros(7, 2, dtype=ids_type)
                backend.map_and_record(
                    ids, torch.zeros(1, 4, dtype=table_type), torch.ones(1, dtype=torch.int32), load, offset=3
                )
                backend.map_and_record(
                    ids.t(), torch.zeros(1, 1, dtype=table_type), torch.ones(1, dtype=torch.int64), load
                )
    assert len(signatures) == before


def test_mapping_is_the_same_without_the_compiler(backend: CpuBackend) -> None:
    script = """
        import torch
        from eplb_backends.cpu import CpuBackend
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(-1, 4, (200, 3), generator=generator, dtype=torch.int32)
        table = torch.tensor([[5, -1, -1], [0, 1, -1], [2, 3, 4], [6, 7, -1]], dtype=torch.int32)
        load = torch.zeros(8, dtype=torch.int64)
        count = torch.tensor([1, 2, 3, 2], dtype=torch.int32)
        physical = CpuBackend().map_and_record(ids, table, count, load, offset=2**31 - 1)
        print(physical.tolist(), load.tolist())
    """
    answers = {
        subprocess.run(
            [sys.executable, "-W", "error", "-c", dedent(script)],
            env={**os.environ, "NUMBA_DISABLE_JIT": disabled},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for disabled in ("0", "1")
    }
    assert len(answers) == 1


@pytest.mark.parametrize("wrong", [4, 2**40, -2])
def test_an_id_that_is_no_expert_is_an_error_not_a_stray_write(backend: CpuBackend, wrong: int) -> None:
    ids = torch.tensor([[0, 1], [2, wrong]])
    table, count = torch.arange(4).unsqueeze(1), torch.ones(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"row 1: {wrong} is not one of 4 logical experts, nor -1"):
        backend.map_and_record(ids, table, count, None)


def test_a_load_of_another_map_is_an_error_not_a_stray_write(backend: CpuBackend) -> None:
    table, count = torch.tensor([[0], [7]]), torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="physical expert 7, but load counts only 7"):
        backend.map_and_record(torch.tensor([[1]]), table, count, torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"contiguous int32 or int64.*got torch\.int16"):
        backend.map_and_record(torch.tensor([[1]]), table, count, torch.zeros(8, dtype=torch.int16))
    with pytest.raises(
        ValueError, match=r"expected logical_ids \[tokens, top_k\].*got \[1\], \[2, 1\], \[2\]"
    ):
        backend.map_and_record(torch.tensor([1]), table, count, None)


# --- weights ---


def test_staging_refuses_experts_of_different_kinds(backend: CpuBackend) -> None:
    with pytest.raises(ValueError, match="one shape and type"):
        backend.allocate_staging([torch.zeros(2), torch.zeros(3)], 1)
    with pytest.raises(ValueError, match="cannot stage -1 experts"):
        backend.allocate_staging(torch.zeros(2, 3), -1)


def test_swap_in_refuses_slots_without_rows(backend: CpuBackend) -> None:
    parameter = torch.zeros(4, 2)
    staging = backend.allocate_staging(parameter, 2)
    with pytest.raises(ValueError, match=r"2 slots \[0, 1\] cannot take 1 rows \[0\]"):
        backend.swap_in(parameter, [0, 1], staging, [0])


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_swap_in_by_block_or_one_by_one_is_the_same(data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, 7), unique=True, max_size=5))
    if data.draw(st.booleans()):
        slots.sort()
    first = data.draw(st.integers(0, 5))
    rows = [(first + place) % 6 for place in range(len(slots))]
    backend, parameter = CpuBackend(), torch.zeros(8, 3).to(torch.bfloat16)
    staging = backend.allocate_staging(parameter, 6)
    for row in range(6):
        staging[row].fill_(row + 1)
    backend.swap_in(parameter, slots, staging, rows)
    written = dict(zip(slots, rows, strict=True))
    assert [int(expert[0]) for expert in parameter] == [written.get(slot, -1) + 1 for slot in range(8)]


def test_checksums_take_every_type_and_shape(backend: CpuBackend) -> None:
    tensors = [
        torch.zeros(3, dtype=torch.float8_e4m3fn),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor([True]),
        torch.zeros(0),
        torch.nn.Parameter(torch.ones(2, 2)),
    ]
    assert 0 <= backend.checksum(tensors) < 2**63
    assert backend.checksum([torch.zeros(4)]) != backend.checksum([torch.zeros(5)])


# --- the group ---


def test_a_group_of_one_rank(alone: CpuBackend) -> None:
    alone.warm_up()
    assert alone.sum_on_host(np.arange(3)).tolist() == [0, 1, 2]
    assert alone.broadcast_on_host(np.arange(3), 0).tolist() == [0, 1, 2]
    alone.exchange([], [])
    alone.abort()
    with pytest.raises(GroupError, match="rebuild it"):
        alone.sum_on_host(np.arange(3))
    alone.rebuild(1)
    assert alone.sum_on_host(np.arange(3)).tolist() == [0, 1, 2]


def test_a_rank_is_not_its_own_peer(alone: CpuBackend) -> None:
    with pytest.raises(ValueError, match="a message has peer 0; expected one of the other ranks"):
        alone.exchange([Message(0, torch.zeros(1))], [Message(0, torch.zeros(1))])
    alone.exchange([], [])


def test_an_epoch_is_used_once(alone: CpuBackend) -> None:
    alone.rebuild(3)
    with pytest.raises(ValueError, match="epoch 3 was used: rebuild needs one above 3"):
        alone.rebuild(3)


def test_arrays_that_are_not_int64_are_refused(alone: CpuBackend) -> None:
    with pytest.raises(ValueError, match="int64, got float32"):
        alone.sum_on_host(np.zeros(2, np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"source 1 is not one of the ranks \[0\]"):
        alone.broadcast_on_host(np.zeros(2, np.int64), 1)


def test_order_of_use(backend: CpuBackend, alone: CpuBackend) -> None:
    for use in (backend.warm_up, lambda: backend.rebuild(1), lambda: backend.exchange([], [])):
        with pytest.raises(GroupError, match="connect"):
            use()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
        backend.connect(store, 2, 2, 1.0)
    with pytest.raises(ValueError, match="time-out must be positive, got 0"):
        backend.connect(store, 0, 1, 0)
    with pytest.raises(GroupError, match="connect was called twice"):
        alone.connect(store, 0, 1, 1.0)
    alone.close()
    with pytest.raises(GroupError, match="nothing after close"):
        alone.sum_on_host(np.zeros(1, np.int64))


def test_a_missing_rank_is_named(backend: CpuBackend) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(GroupError, match=r"rank 0: join: no sign of ranks \[1, 2\] within 0\.1 s"):
        backend.connect(store, 0, 3, 0.1)


# --- faults ---


def test_a_fault_hits_the_call_it_is_meant_for(alone: CpuBackend) -> None:
    faulty = with_fault(alone, "sum_on_host", call=2, error=RuntimeError("injected"))
    assert faulty is alone
    assert faulty.sum_on_host(np.ones(1, np.int64)).tolist() == [1]
    with pytest.raises(RuntimeError, match="injected"):
        faulty.sum_on_host(np.ones(1, np.int64))
    assert faulty.sum_on_host(np.ones(1, np.int64)).tolist() == [1]


def test_faults_that_drop_and_delay_every_call(backend: CpuBackend) -> None:
    parameter = torch.zeros(2, 2)
    staging = backend.allocate_staging(torch.ones(2, 2), 2)
    staging[0].fill_(1)
    with_fault(backend, "swap_in", call=None, drop=True, delay_s=0.05)
    started = time.monotonic()
    backend.swap_in(parameter, [0], staging, [0])
    backend.swap_in(parameter, [1], staging, [0])
    assert time.monotonic() - started >= 0.1
    assert not parameter.any()
    with pytest.raises(ValueError, match="CpuBackend has no method 'swop_in'"):
        with_fault(backend, "swop_in", drop=True)
