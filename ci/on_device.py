"""The report that `ci/on_ascend.sh` and `ci/on_cuda.sh` print, as Markdown to paste.

python -m ci.on_device ascend [--ranks 2]

Runs on the device: the versions, the contract of backends by each transport, the demo beside the CPU's, and
the bandwidth of a swap beside a plain copy. Ends with 1 where something is missing or failed, and says
what.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile

from ci.device_measures import EXPERT_BYTES, EXPERTS, measure_bandwidth
from eplb_platform.backend import Backend, discover_backends
from eplb_platform.testing.processes import RankError, run_ranks

TOOLS = {"ascend": ["npu-smi", "info"], "cuda": ["nvidia-smi", "-L"]}
TRANSPORTS = ("host", "collective")
LINES_OF_A_FAILURE = 12


def collective_class(backend: str) -> type[Backend]:
    """The backend with the transport that the device's collective library carries."""
    if backend == "ascend":
        from ci.collective_backends import CollectiveAscend

        return CollectiveAscend
    from ci.collective_backends import CollectiveCuda

    return CollectiveCuda


def report_versions(backend: str) -> str | None:
    """Prints them; returns what is missing, None where the backend can be used."""
    print(f"## Versions\n\n- {platform.platform()}, Python {platform.python_version()}")
    tool = TOOLS[backend]
    if shutil.which(tool[0]) is None:
        print(f"- missing: {tool[0]} is not on the path: is the driver installed?")
    else:
        done = subprocess.run(tool, capture_output=True, text=True)
        print("\n```\n" + (done.stdout or done.stderr).strip() + "\n```\n")
    (report,) = (report for report in discover_backends() if report.name == backend)
    print(f"- {', '.join(f'{name} {version}' for name, version in report.versions.items())}")
    print(f"- backend {backend}: {report.reason}")
    return None if report.usable else report.reason


def ranks_by(transport: str, ranks: int, devices: int) -> int:
    """Collective libraries refuse ranks that share a device."""
    return ranks if transport == "host" else min(ranks, devices)


def report_contract(backend: str, device: str, ranks: int, devices: int) -> bool:
    from eplb_platform.testing.contract import run_contract

    print("\n## Contract of backends\n")
    well = True
    for transport in TRANSPORTS:
        tested = backend if transport == "host" else collective_class(backend)
        together = ranks_by(transport, ranks, devices)
        results = run_contract(tested, together, device=device)
        failed = [result for result in results if not result.passed]
        well = well and not failed
        print(
            f"- transport {transport}, {together} ranks: {len(results) - len(failed)} of {len(results)} "
            "clauses kept"
        )
        for result in failed:
            tail = "\n".join(result.detail.splitlines()[-LINES_OF_A_FAILURE:])
            print(f"\n  {result.name}:\n\n```\n{tail}\n```\n")
    return well


def report_demo(backend: str, ranks: int) -> bool:
    print(f"\n## Demo, {ranks} ranks\n")
    well = True
    for name in (backend, "cpu"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "eplb_platform.cli", "demo", "--backend", name]
            options = ["--ranks", str(ranks), "--quick", "--json"]
            done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            well = False
            print(f"- {name}: failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        result = json.loads(done.stdout)
        dynamic = result["phases"]["dynamic"]
        well = well and bool(result["tokens_identical"])
        print(
            f"- {name}: tokens identical in all phases: {result['tokens_identical']}; balancedness "
            f"{result['phases']['contiguous']['balancedness']:.3f} -> {dynamic['balancedness']:.3f}; "
            f"{dynamic['cycles']} cycles, {dynamic['moved_experts']} experts moved"
        )
    return well


def report_bandwidth(backend: str, ranks: int, devices: int) -> bool:
    mib = EXPERTS * EXPERT_BYTES // 2**20
    print(f"\n## Bandwidth, {ranks} ranks, {mib} MiB each way\n")
    print("| transport | rank | exchange and swap, GB/s | plain copy on the device, GB/s |")
    print("| --- | --- | --- | --- |")
    well = True
    for transport in TRANSPORTS:
        if ranks_by(transport, ranks, devices) < ranks:
            print(f"| {transport} | not measured: {devices} devices for {ranks} ranks | | |")
            continue
        try:
            measured = run_ranks(measure_bandwidth, ranks, backend, transport, timeout_s=300.0)
        except RankError as error:
            well = False
            print(f"| {transport} | failed: {str(error).splitlines()[-1]} | | |")
            continue
        for rank, of_rank in enumerate(measured):
            print(f"| {transport} | {rank} | {of_rank.exchange_and_swap:.2f} | {of_rank.plain_copy:.2f} |")
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("backend", choices=sorted(TOOLS))
    parser.add_argument("--ranks", type=int, help="default: the devices, at most 4, and no fewer than 2")
    given = parser.parse_args()
    backend: str = given.backend
    print(f"# eplb_platform on {backend}\n")
    missing = report_versions(backend)
    if missing is not None:
        print(f"\nNothing of what follows was run: {missing}")
        return 1
    import torch

    count = torch.accelerator.device_count()
    ranks: int = given.ranks or min(max(count, 2), 4)
    if count < ranks:
        print(f"- {count} devices for {ranks} ranks: ranks share them, but for transport collective")
    device = "npu" if backend == "ascend" else backend
    parts = (
        report_contract(backend, device, ranks, count),
        report_demo(backend, ranks),
        report_bandwidth(backend, ranks, count),
    )
    print(f"\n{'All of it worked.' if all(parts) else 'Something above failed.'}")
    return 0 if all(parts) else 1


if __name__ == "__main__":
    sys.exit(main())
