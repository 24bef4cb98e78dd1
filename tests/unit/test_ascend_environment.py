"""What is said about torch_npu and CANN, with packages in a folder of a test: one clear line for a fault."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from eplb_backends.ascend import environment

RELEASE = torch.__version__.partition("+")[0]
GOOD = """
    import sys, types
    npu = types.SimpleNamespace(device_count=lambda: 0)
    def _autoload(): pass
"""
RAISES = """
    import os
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    raise {error}
"""


class Machine:
    """A folder that Python and the dynamic linker search first."""

    def __init__(self, folder: Path) -> None:
        self.site = folder
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ASCEND_")},
            "PYTHONPATH": str(folder),
            "LD_LIBRARY_PATH": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def install_torch_npu(
        self, source: str, version: str = RELEASE, extension: str = "torch_npu:_autoload"
    ) -> None:
        (self.site / "torch_npu.py").write_text(dedent(source))
        self._describe("torch_npu", version, f"[torch.backends]\ntorch_npu = {extension}\n")

    def install_vendor(self, source: str, entry_point: str) -> None:
        (self.site / "vendor.py").write_text(dedent(source))
        self._describe("vendor", "1.0", f"[eplb_platform.backends]\nvendor = {entry_point}\n")

    def install_hccl(self) -> None:
        """Any library will do: it is loaded, and nothing of it is called."""
        name = ctypes.util.find_library("m")
        assert name is not None
        library = next(path for path in map(Path, self._loaded(name)) if path.exists())
        (self.site / "libhccl.so").symlink_to(library)

    def discover(self, **variables: str) -> dict[str, dict[str, str]]:
        """The reports, by name, of a process that imports torch only when discovery does."""
        script = """
            import json
            from dataclasses import asdict
            from eplb_platform import discover_backends, load_backend
            reports = {report.name: asdict(report) for report in discover_backends()}
            load_backend("cpu").checksum([])
            print(json.dumps(reports))
        """
        command = [sys.executable, "-c", dedent(script)]
        environment = {**self._environment, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    def _describe(self, name: str, version: str, entry_points: str) -> None:
        information = self.site / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (information / "entry_points.txt").write_text(entry_points)

    @staticmethod
    def _loaded(name: str) -> list[str]:
        ctypes.CDLL(name)
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line.split()[-1] for line in lines if Path(line.split()[-1]).name.startswith("libm")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def only_ascend_is_affected(reports: dict[str, dict[str, str]], reason: str) -> None:
    assert reports["cpu"]["usable"]
    assert reports["cpu"]["reason"] == "ready"
    assert not reports["ascend"]["usable"]
    assert reports["ascend"]["device_type"] == "npu"
    assert reason in reports["ascend"]["reason"]
    for report in reports.values():
        assert "\n" not in report["reason"]


def test_nothing_installed(machine: Machine) -> None:
    reports = machine.discover()
    only_ascend_is_affected(reports, f"torch_npu is not installed: pip install torch_npu=={RELEASE}")


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_a_missing_library_of_cann(machine: Machine, autoload: str) -> None:
    machine.install_torch_npu(
        RAISES.format(error="ImportError('libhccl.so: cannot open shared object file')")
    )
    reports = machine.discover(TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    only_ascend_is_affected(
        reports, "CANN cannot be loaded (OSError: libhccl.so: cannot open shared object file"
    )
    assert reports["ascend"]["reason"].endswith("are not set: install CANN and source its set_env.sh")
    assert reports["ascend"]["versions"] == {"torch": torch.__version__, "torch_npu": RELEASE}


def test_a_version_for_another_torch(machine: Machine) -> None:
    machine.install_hccl()
    machine.install_torch_npu(
        RAISES.format(error="ImportError('undefined symbol: _ZN5torch3jit')"), "2.1.0.post3"
    )
    only_ascend_is_affected(
        machine.discover(),
        f"torch_npu 2.1.0.post3 does not fit torch {torch.__version__}: pip install torch_npu=={RELEASE}, or "
        "torch==2.1.0",
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("RuntimeError('driver\\n  is not loaded')", "RuntimeError: driver is not loaded"),
        ("SystemExit('no licence')", "SystemExit: no licence"),
    ],
)
def test_an_error_at_import(machine: Machine, error: str, expected: str) -> None:
    machine.install_hccl()
    machine.install_torch_npu(RAISES.format(error=error))
    only_ascend_is_affected(machine.discover(), f"torch_npu {RELEASE} fails to import: {expected}")


def test_an_entry_point_to_a_missing_module(machine: Machine) -> None:
    machine.install_hccl()
    machine.install_torch_npu(GOOD, extension="torch_npu_gone:_autoload")
    machine.install_vendor("", "vendor_gone:Backend")
    reports = machine.discover()
    only_ascend_is_affected(
        reports, "torch_npu sees no NPU: check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
    )
    assert "No module named 'vendor_gone'" in reports["vendor"]["reason"]


def test_a_contract_of_another_version(machine: Machine) -> None:
    machine.install_vendor(
        """
        from eplb_backends.ascend import AscendBackend

        class Old(AscendBackend):
            contract_version = 0
        """,
        "vendor:Old",
    )
    reports = machine.discover()
    only_ascend_is_affected(reports, "torch_npu is not installed")
    assert reports["vendor"]["reason"] == "vendor:Old is written for version 0 of the contract, not 1"


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_npus_are_counted_with_auto_load_on_and_off(machine: Machine, autoload: str) -> None:
    machine.install_hccl()
    machine.install_torch_npu(GOOD.replace("lambda: 0", "lambda: 8"))
    home = machine.site / "cann"
    (home / "x86_64-linux").mkdir(parents=True)
    (home / "x86_64-linux" / "ascend_toolkit_install.info").write_text("package_name=x\nversion=9.1.0\n")
    report = machine.discover(TORCH_DEVICE_BACKEND_AUTOLOAD=autoload, ASCEND_HOME_PATH=str(home))["ascend"]
    assert report["usable"]
    assert report["reason"] == "8 NPUs; transports 'host', 'collective' (HCCL)"
    assert report["versions"] == {"torch": torch.__version__, "torch_npu": RELEASE, "cann": "9.1.0"}


def test_a_library_that_ends_the_process_when_devices_are_counted(machine: Machine) -> None:
    machine.install_hccl()
    machine.install_torch_npu(GOOD.replace("lambda: 0", "lambda: sys.exit('no driver')"))
    reports = machine.discover()
    only_ascend_is_affected(reports, "torch_npu cannot count the devices: SystemExit: no driver")


# --- CANN ---


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\n", "8.2.RC1"),
        ("aarch64-linux/version.info", "Version=8.5.0\nversion_dir=8.5.0\n", "8.5.0"),
        ("version.cfg", "# cfg\nruntime_running_version=[7.5.0.1.129:8.0.0]\n", "8.0.0"),
        ("version.info", "nothing\n", None),
    ],
)
def test_the_version_of_cann_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, version: str | None
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert environment.versions().get("cann") == version


def test_the_first_folder_that_is_named_is_the_home(tmp_path: Path) -> None:
    assert environment.cann_home({"ASCEND_HOME_PATH": str(tmp_path)}) == tmp_path
    assert environment.cann_home({"ASCEND_TOOLKIT_HOME": str(tmp_path)}) == tmp_path
    assert environment.cann_home({"ASCEND_HOME_PATH": str(tmp_path / "gone")}) is None


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("gone", "gone, which is no folder: source the set_env.sh of CANN"),
        ("empty", r"empty has no lib64/libhccl.so: install the toolkit of CANN"),
        ("full", r"source .*full/set_env.sh, and check that the driver is installed"),
    ],
)
def test_what_to_do_about_cann(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "lib64").mkdir(parents=True)
    (tmp_path / "full" / "lib64" / "libhccl.so").touch()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / named))
    monkeypatch.setattr(environment, "_check_versions", lambda: None)
    with pytest.raises(environment.Unavailable, match=expected):
        environment.torch_npu()


@pytest.mark.parametrize("switch", [None, "1"])
def test_an_import_that_fails_leaves_the_switch_of_auto_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str | None
) -> None:
    (tmp_path / "torch_npu.py").write_text(dedent(RAISES.format(error="ImportError('libge_runner.so')")))
    monkeypatch.syspath_prepend(tmp_path)
    for check in ("_check_versions", "_check_cann"):
        monkeypatch.setattr(environment, check, lambda: None)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", switch or "")
    if switch is None:
        monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD")
    with pytest.raises(environment.Unavailable, match=r"fails to import: ImportError: libge_runner\.so"):
        environment.torch_npu()
    assert os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == switch


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.13.0+cpu", "2.13.0"), ("2.7.1.post2", "2.7.1"), ("2.5.1rc1", "2.5.1"), ("2.13.0a0+git1", "2.13.0")],
)
def test_builds_of_one_release_fit_each_other(version: str, release: str) -> None:
    assert environment._release(version) == release
