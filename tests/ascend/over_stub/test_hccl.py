"""The vendor's ProcessGroupHCCL between processes: what it asks of HCCL, and what becomes of options and weights."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import Store

from eplb_backends.ascend.hccl_options import KNOWN, HcclOptions
from eplb_platform.testing.processes import RankPool
from tests.ascend.over_stub.hccl_groups import HALVES, NZ, hccl_group, nz_weight
from tests.ascend.over_stub.recorded import Call, calls_of, of_hccl

OPTIONS: dict[str, object] = {
    "hccl_buffer_size": 77,
    "hccl_op_expansion_mode": 1,
    "hccl_exec_timeout": 90,
    "hccl_algo": "level0:ring",
    "hccl_retry_enable": "L0:0, L1:0, L2:0",
    "hccl_retry_params": "MaxCnt:3, HoldTime:5000, IntervalTime:1000",
    "hccl_world_rank_id": 3,
    "hccl_job_id": 12345,
    "hccl_sdma_qos": 5,
    "qos_traffic_class": 128,
    "qos_service_level": 4,
}


def sums_and_neighbours(rank: int, num_ranks: int, store: Store) -> list[Call]:
    """A sum, then every rank's NZ weight to the next rank in one batch."""

    def run() -> None:
        with hccl_group(store, rank, num_ranks, OPTIONS):
            total = torch.full((5,), float(rank + 1)).npu()
            dist.all_reduce(total)
            assert total.cpu().tolist() == [num_ranks * (num_ranks + 1) / 2] * 5
            weight, _ = nz_weight(rank)
            received, _ = nz_weight(99)
            address = received.data_ptr()
            before = (rank - 1) % num_ranks
            for work in dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, weight, (rank + 1) % num_ranks),
                    dist.P2POp(dist.irecv, received, before),
                ]
            ):
                work.wait()
            assert torch.equal(received.cpu(), nz_weight(before)[1])
            assert received.data_ptr() == address
            assert torch.ops.npu.get_npu_format(received) == NZ

    return of_hccl(calls_of(run))


def check_calls(calls: list[Call]) -> None:
    (joined,) = (call for call in calls if str(call["call"]).startswith("HcclCommInit"))
    given = joined["config"]
    assert isinstance(given, dict)
    assert {name: given[name] for name in OPTIONS} == OPTIONS
    sent = [call for call in calls if "grouped" in call]
    assert len(sent) == 2
    assert all((call["count"], call["data_type"]) == (2048, HALVES) for call in sent)


def test_options_reach_hccl_and_nz_is_sent_with_its_padding(pair: RankPool) -> None:
    """30 x 50 halves have 1,500 elements and store 2,048."""
    for calls in pair.run(sums_and_neighbours):
        check_calls(calls)


def test_the_same_between_four(four: RankPool) -> None:
    for calls in four.run(sums_and_neighbours):
        check_calls(calls)


def test_every_other_known_option_reaches_hccl_too(pair: RankPool) -> None:
    """These two share the group's name and its buffer."""
    rest = sorted(KNOWN.keys() - OPTIONS.keys())
    assert rest == ["group_name", "hccl_buffer_name", "hccl_sym_win_max_mem_size_per_rank"]
    for given in pair.run(config_given, {"group_name": "eplb", "hccl_buffer_name": "ours"}):
        assert isinstance(given, dict)
        assert (given["group_name"], given["hccl_buffer_name"]) == ("eplb", "ours")


def config_given(rank: int, num_ranks: int, store: Store, options: dict[str, object]) -> object:
    def run() -> None:
        with hccl_group(store, rank, num_ranks, options):
            dist.all_reduce(torch.ones(1).npu())

    return next(call["config"] for call in of_hccl(calls_of(run)) if "config" in call)


def test_a_misspelt_option_is_refused_by_us_alone(pair: RankPool) -> None:
    with pytest.raises(ValueError, match="no option 'hccl_bufer_size', the nearest is 'hccl_buffer_size'"):
        HcclOptions({"hccl_bufer_size": 77})
    for given in pair.run(misspelt):
        assert isinstance(given, dict)
        assert given["hccl_buffer_size"] != 77


def misspelt(rank: int, num_ranks: int, store: Store) -> object:
    """What reaches HCCL of it where nobody looks."""
    from eplb_backends.ascend import environment

    unchecked = HcclOptions({}).to_process_group(environment.torch_npu(), timedelta(minutes=1))
    unchecked.hccl_config = {"hccl_bufer_size": 77}  # type: ignore[attr-defined]
    torch.npu.set_device(rank)

    def run() -> None:
        dist.init_process_group("hccl", store=store, rank=rank, world_size=num_ranks, pg_options=unchecked)
        dist.all_reduce(torch.ones(1).npu())
        dist.destroy_process_group()

    return next(call["config"] for call in of_hccl(calls_of(run)) if "config" in call)


def test_a_single_send_of_nz_is_cut_short_by_torch_npu(pair: RankPool) -> None:
    """Why weights go in batches: one by one torch_npu counts the elements without their padding, and makes
    another communicator that has none of the group's options.
    """
    for calls, arrived in pair.run(single_send):
        (message,) = (call for call in calls if call["call"] in ("HcclSend", "HcclRecv"))
        assert message["count"] == 1500
        assert not arrived
        buffers = [call["config"]["hccl_buffer_size"] for call in calls if "config" in call]  # type: ignore[index]
        assert buffers != [77]


def single_send(rank: int, num_ranks: int, store: Store) -> tuple[list[Call], bool]:
    arrived = False

    def run() -> None:
        nonlocal arrived
        with hccl_group(store, rank, num_ranks, {"hccl_buffer_size": 77}):
            weight, values = nz_weight(7)
            if rank == 0:
                dist.send(weight, 1)
            else:
                received, _ = nz_weight(99)
                dist.recv(received, 0)
                arrived = torch.equal(received.cpu(), values)
            torch.npu.synchronize()

    return of_hccl(calls_of(run)), arrived


# --- what goes wrong ---


def test_calls_that_do_not_fit_are_told_to_the_user(pair: RankPool) -> None:
    for text in pair.run(mismatched):
        assert "all_reduce" not in text
        assert "EI0005" in text
        assert "and that rank's call is" in text


def mismatched(rank: int, num_ranks: int, store: Store) -> str:
    torch.npu.set_device(rank)
    with hccl_group(store, rank, num_ranks, {"hccl_exec_timeout": 5}):
        try:
            dist.all_reduce(torch.ones(3 + rank).npu())
            torch.npu.synchronize()
        except RuntimeError as error:
            return str(error)
        return "nothing was raised"
