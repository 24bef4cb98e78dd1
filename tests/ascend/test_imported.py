"""The vendor's torch_npu, imported for real over the stub of CANN, without the stub's operators."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest

from eplb_backends.ascend.hccl_options import KNOWN
from tests.ascend.cann_stub import build
from tests.ascend.wheel import Wheel


@pytest.fixture(scope="module")
def cann(environment: Path, wheel: Wheel) -> Path:
    if missing := build.missing_tools():
        pytest.skip(f"no {' and no '.join(missing)} to make the stub of CANN with")
    return build.built(environment / "cann-stub", wheel.root)


def run(environment: Path, cann: Path, script: str, **variables: str) -> object:
    """What the script prints last, as JSON."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ASCEND_")}
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", dedent(script)],
        env={**inherited, "LD_LIBRARY_PATH": str(cann), "CANN_STUB_DEVICES": "2", **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_the_backend_is_usable_with_auto_load_on_and_off(
    environment: Path, cann: Path, autoload: str
) -> None:
    script = """
        import json
        from eplb_platform import discover_backends
        print(json.dumps({report.name: [report.usable, report.reason] for report in discover_backends()}))
    """
    reports = run(environment, cann, script, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    assert isinstance(reports, dict)
    assert reports["ascend"] == [True, "2 NPUs; transports 'host', 'collective' (HCCL)"]
    assert reports["cpu"] == [True, "ready"]


def test_a_group_s_options_take_every_option_and_misspelt_ones_too(environment: Path, cann: Path) -> None:
    """The largest values arrive as they are; the library does not look at names, which is why we do."""
    largest = {
        name: getattr(kind, "most", "x" * (getattr(kind, "size", 1) - 1)) for name, kind in KNOWN.items()
    }
    largest["qos_traffic_class"] = 252
    script = f"""
        import json
        from datetime import timedelta
        from eplb_backends.ascend import environment
        from eplb_backends.ascend.hccl_options import HcclOptions
        torch_npu = environment.torch_npu()
        options = HcclOptions({largest}).to_process_group(torch_npu, timedelta(seconds=1800))
        assert type(options) is torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options
        assert options._timeout == timedelta(seconds=1800)
        misspelt = type(options)()
        misspelt.hccl_config = {{"hccl_bufer_size": 1}}
        print(json.dumps([options.hccl_config, misspelt.hccl_config]))
    """
    assert run(environment, cann, script) == [largest, {"hccl_bufer_size": 1}]


def test_operators_and_the_device_module_are_there(environment: Path, cann: Path) -> None:
    script = """
        import json
        import torch
        from eplb_backends.accelerator.streams import DeviceModule
        from eplb_backends.ascend import environment
        from eplb_backends.ascend.nz_format import FormatOperators
        torch_npu = environment.torch_npu()
        wanted = ((torch_npu, FormatOperators), (torch_npu.npu, DeviceModule))
        names = [(owner, name) for owner, kind in wanted for name in vars(kind) if name[0] != "_"]
        lacking = [name for owner, name in names if not callable(getattr(owner, name, None))]
        assert len(names) >= 10
        print(json.dumps([lacking, torch_npu.npu is torch.npu, callable(torch_npu.npu_moe_update_expert)]))
    """
    assert run(environment, cann, script) == [[], True, True]
