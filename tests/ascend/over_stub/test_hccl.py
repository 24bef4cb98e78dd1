"""The vendor's ProcessGroupHCCL between processes: what it asks of HCCL, and with which options."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import Store

from eplb_backends.ascend import environment
from eplb_backends.ascend.hccl_group import new_group
from eplb_backends.ascend.hccl_options import KNOWN, HcclOptions
from eplb_platform.backend import Message
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
    "hccl_job_id": 2**32,
    "hccl_sdma_qos": 5,
    "qos_traffic_class": 128,
    "qos_service_level": 4,
}


def weights_to_neighbours(rank: int, num_ranks: int, store: Store) -> list[Call]:
    """Every rank's NZ weight to the next rank, through the backend's own group."""

    def run() -> None:
        torch_npu = environment.torch_npu()
        torch.npu.set_device(rank)
        torch.npu.config.allow_internal_format = True
        group = new_group(
            torch_npu, store, rank, num_ranks, HcclOptions(OPTIONS), watchdog_timeout=timedelta(minutes=1)
        )
        weight, _ = nz_weight(rank)
        received, _ = nz_weight(99)
        address, before = received.data_ptr(), (rank - 1) % num_ranks
        group.exchange([Message((rank + 1) % num_ranks, weight)], [Message(before, received)])
        assert torch.equal(received.cpu(), nz_weight(before)[1])
        assert received.data_ptr() == address
        assert torch.ops.npu.get_npu_format(received) == NZ
        group.abort()

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
    for calls in pair.run(weights_to_neighbours):
        check_calls(calls)


def test_the_same_between_four(four: RankPool) -> None:
    for calls in four.run(weights_to_neighbours):
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
            total = torch.full((5,), rank + 1).npu()
            dist.all_reduce(total)
            assert total.cpu().tolist() == [3] * 5

    return next(call["config"] for call in of_hccl(calls_of(run)) if "config" in call)


def test_a_misspelt_option_is_refused_by_us_alone(pair: RankPool) -> None:
    with pytest.raises(ValueError, match="no option 'hccl_bufer_size', the nearest is 'hccl_buffer_size'"):
        HcclOptions({"hccl_bufer_size": 77})
    for given in pair.run(misspelt):
        assert isinstance(given, dict)
        assert given["hccl_buffer_size"] != 77


def misspelt(rank: int, num_ranks: int, store: Store) -> object:
    """What reaches HCCL of it where nobody looks."""
    unchecked = HcclOptions({}).to_process_group(environment.torch_npu(), timedelta(minutes=1))
    unchecked.hccl_config = {"hccl_bufer_size": 77}  # type: ignore[attr-defined]
    torch.npu.set_device(rank)

    def run() -> None:
        dist.init_process_group("hccl", store=store, rank=rank, world_size=num_ranks, pg_options=unchecked)
        dist.all_reduce(torch.ones(1).npu())
        dist.destroy_process_group()

    return next(call["config"] for call in of_hccl(calls_of(run)) if "config" in call)


def test_a_single_send_has_none_of_the_group_s_options(pair: RankPool) -> None:
    """Why the backend makes batches itself: what torch.distributed sends one by one goes through another
    communicator, without the options, and NZ by way of a plain copy.
    """
    results = pair.run(single_send)
    for calls, _ in results:
        (message,) = (call for call in calls if call["call"] in ("HcclSend", "HcclRecv"))
        assert message["count"] == 1500
        (config,) = (call["config"] for call in calls if "config" in call)
        assert isinstance(config, dict)
        assert config["hccl_buffer_size"] != 77
    assert results[1][1]


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


def test_calls_that_do_not_fit_reach_the_user_in_hccl_s_words(lost_pair: RankPool) -> None:
    """Either as an error, or from torch_npu's watchdog, which ends the process."""
    for outcome in lost_pair.outcomes(mismatched):
        assert outcome.error is not None
        assert "HcclAllReduce from rank" in outcome.error
        assert "and that rank's call is HcclAllReduce" in outcome.error


def mismatched(rank: int, num_ranks: int, store: Store) -> None:
    with hccl_group(store, rank, num_ranks, {}):
        dist.all_reduce(torch.ones(3 + rank).npu())
        torch.npu.synchronize()
        time.sleep(10.0)


def test_a_rank_that_never_comes_is_told_with_what_to_do(lost_pair: RankPool) -> None:
    """HCCL's own words and time-out, our advice, in one line."""
    text = str(lost_pair.run(alone)[0])
    assert "EI0006: rank 0: not all of 2 ranks have joined within 2 s" in text
    assert "check that all have started, the network between the devices" in text
    assert "torch_npu: " in text
    assert len(text.splitlines()) == 1


def alone(rank: int, num_ranks: int, store: Store) -> str | None:
    if rank != 0:
        return None
    torch.npu.set_device(rank)
    group = new_group(
        environment.torch_npu(), store, 0, 2, HcclOptions({}), watchdog_timeout=timedelta(minutes=1)
    )
    with mock.patch.dict(os.environ, {"HCCL_CONNECT_TIMEOUT": "2"}):
        try:
            group.exchange([Message(1, torch.ones(4).npu())], [])
        except RuntimeError as error:
            return str(error)
    return "nothing was raised"
