"""What only a GPU can show: overlapping streams, captured graphs, a thread that is not held up, bandwidth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from eplb_backends.accelerator.streams import CaptureError, wait_on_host
from eplb_backends.cpu.mapping import map_and_record as map_on_cpu
from eplb_backends.cuda import CudaBackend
from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm.table_writer import TableWriter
from eplb_platform.migration.schedule import build_schedule
from eplb_platform.migration.staging import Staging
from eplb_platform.migration.transfer import Migrator
from eplb_platform.runtime.deferred_reads import DeferredReader
from eplb_platform.topology import Topology

LONG = 200_000_000
"""Clock cycles that keep a stream busy for about a tenth of a second."""
SHARE_OF_PLAIN_COPY = 0.8
"""Of a plain device copy's bandwidth, that a swap of experts of several MB reaches at least."""


@pytest.fixture
def backend() -> CudaBackend:
    return CudaBackend()


def keep_busy(cycles: int = LONG) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[attr-defined]


def elapsed_ms(backend: CudaBackend, work: Callable[[], object]) -> float:
    """On the device, which is kept busy until everything is enqueued."""
    timer = backend.timer()
    keep_busy(LONG // 20)
    timer.start()
    work()
    timer.stop()
    torch.cuda.synchronize()
    elapsed = timer.elapsed_ms()
    assert elapsed is not None
    return elapsed


def test_copies_run_beside_the_forward_stream(backend: CudaBackend) -> None:
    """The transfer stream finishes its copy while the forward stream is still busy."""
    streams = backend.streams
    source = torch.arange(1_000_000, device="cuda")
    on_host = backend.allocate_on_host((1_000_000,), torch.int64)
    before = streams.record()
    keep_busy()
    forward = streams.record()
    with streams.transfer():
        streams.wait(before)
        streams.copy(on_host, source)
        copied = streams.record()
    assert wait_on_host(streams, copied, time.monotonic() + 5)
    assert not streams.passed(forward)
    assert torch.equal(on_host, torch.arange(1_000_000))
    torch.cuda.synchronize()
    assert streams.passed(forward)


def test_the_forward_thread_is_not_held_up(backend: CudaBackend) -> None:
    """Waiting for a mark, a swap, a write of tables, mapping and reading a load are enqueued while the device
    is busy.
    """
    weights = torch.zeros(4, 1024, 1024, device="cuda")
    staging = backend.allocate_staging(weights, 2)
    table, counts = torch.arange(8, device="cuda").reshape(4, 2), torch.full((4,), 2, device="cuda")
    ids, load = torch.ones(64, 2, dtype=torch.int64, device="cuda"), torch.zeros(8, dtype=torch.int64).cuda()
    reader: DeferredReader[int] = DeferredReader(backend, (8,), torch.int64)
    tables, rows = torch.zeros(3, 4, 100, dtype=torch.int64, device="cuda"), np.ones((2, 4, 2), np.int32)
    writer = TableWriter(backend, torch.int64, entries=rows.size)

    def one_pass() -> object:
        streams = backend.streams
        with streams.transfer():
            mark = streams.record()
        streams.wait(mark)
        backend.swap_in(weights, [0, 1], staging, [0, 1])
        backend.map_and_record(ids, table, counts, load)
        writer.write(tables[:, :, :2], [0, 2], rows)
        reader.put(load, 0)
        reader.ready()
        return streams.record()

    one_pass()  # loads kernels, which synchronises
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep_busy()
        assert not backend.streams.passed(one_pass())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert tables[[0, 2], :, :2].eq(1).all() and int(tables.sum()) == rows.size


def test_ids_are_mapped_as_on_the_cpu(backend: CudaBackend) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 60, (4096, 8), generator=generator)
    counts = torch.randint(1, 5, (60,), generator=generator)
    table = torch.full((60, 5), -1)
    for expert, physical in enumerate(torch.randperm(int(counts.sum())).split(counts.tolist())):
        table[expert, : len(physical)] = physical
    load = torch.zeros(int(counts.sum()), dtype=torch.int64)
    load_on_gpu = load.cuda()
    expected = map_on_cpu(ids, table, counts, load, 3)
    actual = backend.map_and_record(ids.cuda(), table.cuda(), counts.cuda(), load_on_gpu, 3)
    assert torch.equal(actual.cpu(), expected)
    assert torch.equal(load_on_gpu.cpu(), load)


def test_a_captured_graph_follows_tables_and_weights_that_change_in_place(backend: CudaBackend) -> None:
    """The graph routes and reads weights; between replays the table is written and an expert swapped in."""
    ids = torch.tensor([[0], [1], [2], [-1]], device="cuda")
    table, counts = torch.tensor([[0], [1], [2]], device="cuda"), torch.ones(3, dtype=torch.int64).cuda()
    load = torch.zeros(3, dtype=torch.int64, device="cuda")
    weights = torch.tensor([[10.0], [11.0], [12.0]], device="cuda")
    staging = backend.allocate_staging(weights, 3)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        physical = backend.map_and_record(ids, table, counts, load)
        return physical, weights[physical.clamp(min=0)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        forward()
    torch.cuda.current_stream().wait_stream(aside)
    load.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(CaptureError):
            backend.streams.record()
        physical, read = forward()
    graph.replay()
    torch.cuda.synchronize()
    assert physical.flatten().tolist() == [0, 1, 2, -1]
    assert read.flatten().tolist() == [10, 11, 12, 10]

    new_table = backend.allocate_on_host((3, 1), torch.int64)
    new_table.copy_(torch.tensor([[1], [2], [0]]))
    arrived = torch.tensor([[12.0], [10.0], [11.0]], device="cuda")
    free = backend.streams.record()
    with backend.streams.transfer():
        backend.streams.wait(free)
        for row in range(3):
            backend.streams.copy(staging[row], arrived[row])
        filled = backend.streams.record()
    backend.streams.wait(filled)
    backend.swap_in(weights, [0, 1, 2], staging, [0, 1, 2])
    backend.streams.copy(table, new_table)
    graph.replay()
    torch.cuda.synchronize()
    assert physical.flatten().tolist() == [1, 2, 0, -1]
    assert read.flatten().tolist() == [10, 11, 12, 12]
    assert load.tolist() == [2, 2, 2]


def test_experts_move_while_the_model_reads_them(backend: CudaBackend) -> None:
    """Hundreds of chunks between slots of one rank, fetched by a second thread beside busy passes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    backend.connect(store, rank=0, num_ranks=1, timeout_s=30.0)
    maps = [ExpertMap([row] * 2, 4, Topology(1)) for row in ([0, 1, 2, 3], [3, 0, 1, 2], [1, 3, 0, 2])]
    weights = [[torch.arange(4.0, device="cuda").repeat_interleave(1 << 18).view(4, -1)] for _ in range(2)]
    migrator = Migrator(
        backend, weights, Staging(backend, weights, max_bytes=None, layers_per_chunk=1), rank=0
    )
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    current = maps[0]
    expected = {
        id(a): torch.from_numpy(a.physical_to_logical.astype("float32")).cuda() for a in maps
    }  # [layer, slot]

    def one_pass(right: torch.Tensor) -> None:
        for layer, (parameter,) in enumerate(weights):
            wrong.add_((parameter != right[layer][:, None]).sum())

    for round_ in range(100):
        target = maps[(round_ + 1) % 3]
        right = expected[id(current)].clone()
        for chunk in build_schedule(current, target, layers_per_chunk=1, staging_slots=4).chunks:
            one_pass(right)
            background = threading.Thread(target=migrator.fetch, args=(chunk,))
            background.start()
            one_pass(right)
            background.join()
            one_pass(right)
            migrator.swap(chunk)
            for layer in chunk.layers:
                right[layer] = expected[id(target)][layer]
            one_pass(right)
        current = target
    assert int(wrong) == 0
    assert migrator.experts_copied > 400
    backend.close()


def test_an_unpinned_tensor_is_refused(backend: CudaBackend) -> None:
    with pytest.raises(ValueError, match="not pinned"):
        backend.streams.copy(torch.zeros(3), torch.zeros(3, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is every thread's first")
def test_a_thread_that_starts_on_another_device_enters_the_backends() -> None:
    devices: list[int] = []

    def work() -> None:
        with backend.streams.transfer():
            devices.append(torch.cuda.current_device())

    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        backend = CudaBackend()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert devices == [last]


def test_a_swap_is_about_as_fast_as_a_plain_device_copy(
    backend: CudaBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts of 32 MB, 8 of them, against one copy of as many bytes; both warm, the best of ten."""
    weights = torch.zeros(8, 32_000_000, dtype=torch.uint8, device="cuda")
    staging = backend.allocate_staging(weights, 8)
    plain = torch.zeros_like(weights)
    slots = list(range(8))

    def swap() -> None:
        backend.swap_in(weights, slots, staging, slots)

    def copy() -> None:
        plain.copy_(weights)

    times = {
        name: min(elapsed_ms(backend, work) for _ in range(10))
        for name, work in (("swap", swap), ("plain copy", copy))
    }
    with capsys.disabled():
        gigabytes = weights.nbytes / 1e9
        print("".join(f"\n{name}: {1e3 * gigabytes / ms:.0f} GB/s" for name, ms in times.items()))
    assert times["plain copy"] / times["swap"] > SHARE_OF_PLAIN_COPY
