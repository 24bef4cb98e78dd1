"""The contract of `eplb_platform.backend.Backend` as a suite that any backend can be run through.

    for result in run_contract("cpu", num_ranks=2):
        print(result.name, result.passed, result.detail)

Each clause is a function in `eplb_platform.testing.checks`, and runs on every rank, each a real process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import Store

from eplb_platform.backend import Backend, load_backend
from eplb_platform.testing.checks import CHECKS, Check, Site
from eplb_platform.testing.checks import forward as forward
from eplb_platform.testing.checks import group as group
from eplb_platform.testing.checks import weights as weights
from eplb_platform.testing.processes import RankPool


@dataclass(frozen=True)
class CheckResult:
    """Whether a backend kept one clause; if not, `detail` says on which rank it did what."""

    name: str
    passed: bool
    detail: str


def run_contract(backend: str | type[Backend], num_ranks: int, *, device: str = "cpu") -> list[CheckResult]:
    """Run every clause on `num_ranks` processes; one rank alone leaves out those about several.

    backend: the name of an installed backend, or a class that the processes can import.
    device: as in `torch.device`; for an accelerator rank r gets the device number r modulo their number.
    """
    with RankPool(num_ranks, timeout_s=300.0) as pool:
        return [run_check(pool, backend, name, device=device) for name in clauses(num_ranks)]


def clauses(num_ranks: int) -> list[str]:
    """The names of the clauses that so many ranks can run."""
    return [name for name, check in CHECKS.items() if check.min_ranks <= num_ranks]


def run_check(pool: RankPool, backend: str | type[Backend], name: str, *, device: str = "cpu") -> CheckResult:
    """Run the clause `name` on all ranks of `pool`."""
    if name not in CHECKS:
        raise ValueError(f"no clause {name!r} in the contract; there are {', '.join(CHECKS)}")
    if pool.num_ranks < CHECKS[name].min_ranks:
        raise ValueError(f"clause {name!r} needs {CHECKS[name].min_ranks} ranks, got {pool.num_ranks}")
    outcomes = pool.outcomes(_run_on_rank, backend, name, device)
    failures = [f"rank {outcome.rank}: {outcome.error}" for outcome in outcomes if outcome.error is not None]
    return CheckResult(name, not failures, "\n".join(failures))


def _run_on_rank(
    rank: int, num_ranks: int, store: Store, backend: str | type[Backend], name: str, device: str
) -> None:
    check = CHECKS[name]
    here = _device_of(rank, device)
    made = load_backend(backend) if isinstance(backend, str) else backend()
    site = Site(made, rank, num_ranks, store, here, check.timeout_s)
    try:
        _prepare(site, check)
        check.function(site)
    finally:
        made.close()


def _prepare(site: Site, check: Check) -> None:
    site.meet("all have loaded it")
    if check.connected:
        site.backend.connect(site.store, site.rank, site.num_ranks, check.timeout_s)
        site.backend.warm_up()


def _device_of(rank: int, device: str) -> torch.device:
    if torch.device(device).type == "cpu":
        return torch.device(device)
    number = rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(number)
    return torch.device(device, number)
