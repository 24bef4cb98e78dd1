"""Ranks are real processes: what they return, what is said of them when they fail, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import Store

from eplb_platform.testing.processes import RankError, RankPool, run_ranks

pytestmark = pytest.mark.processes


def meet(rank: int, num_ranks: int, store: Store, key: str) -> tuple[int, int, int]:
    """Who this is, how many ranks came, and on how many threads torch computes."""
    store.set(f"{key}{rank}", "here")
    store.wait([f"{key}{other}" for other in range(num_ranks)])
    came = sum(store.check([f"{key}{other}"]) for other in range(num_ranks))
    return rank, came, torch.get_num_threads()


def first_to_come(rank: int, num_ranks: int, store: Store) -> int:
    return int(store.add("came", 1))


def raise_on(rank: int, num_ranks: int, store: Store, failing: int) -> int:
    os.write(2, b"last words\n")
    if rank == failing:
        raise ValueError(f"no luck on {rank}")
    return rank


def end_by(rank: int, num_ranks: int, store: Store, failing: int, number: int) -> int:
    print("this rank is in trouble")
    if rank == failing:
        os.kill(os.getpid(), number)
    return rank


def sleep(rank: int, num_ranks: int, store: Store, seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def setting(rank: int, num_ranks: int, store: Store) -> str | None:
    return os.environ.get("EPLB_TEST_SETTING")


def give_a_tensor(rank: int, num_ranks: int, store: Store) -> torch.Tensor:
    return torch.full((2,), rank)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_running_after(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_running(pid)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(meet, 3, "a") == [(0, 3, 1), (1, 3, 1), (2, 3, 1)]


def test_a_pool_runs_many_functions_in_the_same_processes() -> None:
    with RankPool(2) as pool:
        pids = pool.run(sleep, 0.0)
        assert pool.run(meet, "b") == [(0, 2, 1), (1, 2, 1)]
        assert sorted(pool.run(first_to_come)) == [1, 2]
        assert sorted(pool.run(first_to_come)) == [1, 2], "each call has a store of its own"
        assert [tensor.tolist() for tensor in pool.run(give_a_tensor)] == [[0, 0], [1, 1]]
        with pytest.raises(RankError, match="raise_on failed on rank 1 of 2") as caught:
            pool.run(raise_on, 1)
        for part in ("ValueError: no luck on 1", "in raise_on", "last words"):
            assert part in str(caught.value)
        assert pool.run(sleep, 0.0) == pids == pool.pids
    assert not any(is_running(pid) for pid in pids)


def test_the_others_results_are_kept_when_one_rank_fails() -> None:
    with RankPool(2) as pool:
        failed, fine = pool.outcomes(raise_on, 0)
    assert failed.error is not None
    assert "no luck on 0" in failed.error
    assert (fine.value, fine.error) == (1, None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_dies_is_reported_with_its_log_and_replaced(number: signal.Signals) -> None:
    with RankPool(2) as pool:
        before = pool.run(sleep, 0.0)
        with pytest.raises(RankError, match=f"exit code -{int(number)}\n.*\nthis rank is in trouble"):
            pool.run(end_by, 1, int(number))
        assert not any(is_running(pid) for pid in before)
        assert set(pool.run(sleep, 0.0)).isdisjoint(before)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_takes_too_long_is_killed_with_all_others(stopped: bool) -> None:
    with RankPool(2) as pool:
        pids = pool.run(sleep, 0.0)
        pool.timeout_s = 1.0
        if stopped:
            os.kill(pids[0], signal.SIGSTOP)
        with pytest.raises(RankError, match="did not finish in time"):
            pool.run(sleep, 600.0)
        assert not any(is_running(pid) for pid in pids)
        assert pool.pids == []


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from eplb_platform.testing.processes import RankPool\n"
        "def sleep(rank, num_ranks, store, seconds):\n"
        "    time.sleep(seconds)\n"
        "if __name__ == '__main__':\n"
        "    with RankPool(2) as pool:\n"
        "        pool.run(sleep, 0.0)\n"
        "        print(*pool.pids, flush=True)\n"
        "        pool.run(sleep, 600.0)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert len(pids) == 2
    assert not any(is_running_after(pid, 120.0) for pid in pids)


def test_ranks_see_the_environment_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(sleep, 1, 0.0)
    monkeypatch.setenv("EPLB_TEST_SETTING", "7")
    assert run_ranks(setting, 2) == ["7", "7"]


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        RankPool(0)
