"""Backends are found by their entry points, and each one's faults stay its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import eplb_platform
from eplb_platform.backend import BackendError
from eplb_platform.cli import listing

TOY = """
    from eplb_backends.cpu import CpuBackend
    from eplb_platform.backend import Availability

    class Toy(CpuBackend):
        name, device_type, collective = "toy", "toy", "gloo"
        availability = classmethod(lambda cls: Availability(True, "ready", {"toy": "3.1"}))
"""

ANSWERS = {
    "none": "None",
    "list": "Availability(True, 'ready', ['3.1'])",
    "unsure": "Availability('yes', 'ready')",
    "wordless": "Availability(False, '')",
    "broken": "Availability(True, 'ready', (_ for _ in ()).throw(RuntimeError('no versions')))",
}
"""What an `availability` does that is no good one."""


def install(site: Path, module: str, source: str, **entry_points: str) -> None:
    """What a package installer would leave: a module, and a dist-info folder with the entry points."""
    (site / f"{module}.py").write_text(dedent(source))
    information = site / f"{module}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (information / "entry_points.txt").write_text("\n".join(["[eplb_platform.backends]", *lines, ""]))


@dataclass
class Answer:
    reports: dict[str, dict[str, object]]
    loaded: list[str]
    imported: list[str]


def ask(site: Path, *loads: str) -> Answer:
    """Load what the expressions say, then discover, in a process that sees the packages in `site`."""
    script = f"""
        import json, sys
        from dataclasses import asdict
        from eplb_platform import discover_backends, load_backend
        loaded = []
        for load in {loads}:
            try:
                loaded.append(type(eval(load)).__name__)
            except Exception as error:
                loaded.append(f"{{type(error).__name__}}: {{error}}")
        imported = sorted(name for name in sys.modules if name.startswith("vendor"))
        reports = {{report.name: asdict(report) for report in discover_backends()}}
        print(json.dumps(dict(reports=reports, loaded=loaded, imported=imported)))
    """
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(site / "cache")}
    command = [sys.executable, "-c", dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return Answer(**json.loads(done.stdout.splitlines()[-1]))


def ask_without(site: Path) -> Answer:
    """What is installed anyway; which of it can be used depends on the machine."""
    nothing = site / "nothing"
    nothing.mkdir()
    return ask(nothing)


def test_the_cpu_backend_is_found_and_is_the_default() -> None:
    reports = {report.name: report for report in eplb_platform.discover_backends()}
    assert reports["cpu"].usable
    assert reports["cpu"].device_type == "cpu"
    assert reports["cpu"].versions["torch"]
    backend = eplb_platform.load_backend()
    assert (backend.name, backend.collective) == ("cpu", "gloo")
    assert eplb_platform.load_backend("cpu") is not eplb_platform.load_backend("cpu")


def test_an_unknown_name_gets_the_nearest_and_all_installed() -> None:
    with pytest.raises(BackendError, match=r"no backend 'cpuu'\. Did you mean 'cpu'\? Installed: .*cpu"):
        eplb_platform.load_backend("cpuu")


def test_a_backend_for_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="'cpu' is for cpu, not for tpu"):
        eplb_platform.load_backend("cpu", device_type="tpu")
    with pytest.raises(BackendError, match=r"no usable backend for 'tpu'.*cpu \(cpu\): ready"):
        eplb_platform.load_backend(device_type="tpu")


def test_an_option_that_the_backend_does_not_take_is_refused() -> None:
    with pytest.raises(BackendError, match=r"backend 'cpu' takes no option 'transport'\. It takes: none"):
        eplb_platform.load_backend("cpu", transport="host")


def test_the_backends_of_accelerators_say_why_they_cannot_be_used_here() -> None:
    reports = {report.name: report for report in eplb_platform.discover_backends()}
    for name, is_there in (("cuda", torch.cuda.is_available()), ("xpu", torch.xpu.is_available())):
        report = reports[name]
        assert (report.device_type, report.collective, report.usable) == (name, "gloo", is_there)
        assert report.versions["torch"] == torch.__version__
        if not is_there:
            with pytest.raises(BackendError, match=f"backend '{name}' cannot be used: torch "):
                eplb_platform.load_backend(name)


def test_each_faulty_backend_is_reported_in_one_line_and_hides_no_other(tmp_path: Path) -> None:
    install(tmp_path, "vendor_good", TOY, good="vendor_good:Toy")
    install(tmp_path, "vendor_library", "import no_such_library", library="vendor_library:Toy")
    install(tmp_path, "vendor_raises", "raise OSError('driver\\n  not loaded')", raises="vendor_raises:Toy")
    install(tmp_path, "vendor_asserts", "assert 1 == 2, 'unsupported'", asserts="vendor_asserts:Toy")
    install(tmp_path, "vendor_exits", "import sys; sys.exit('no licence')", exits="vendor_exits:Toy")
    install(tmp_path, "vendor_empty", "", absent="vendor_nowhere:Toy", nothing="vendor_empty:Toy")
    install(tmp_path, "vendor_other", "Toy = print", other="vendor_other:Toy")
    install(tmp_path, "vendor_old", TOY + "        contract_version = 0\n", old="vendor_old:Toy")
    install(
        tmp_path,
        "vendor_part",
        "from eplb_platform.backend import Backend\nclass Toy(Backend): pass",
        part="vendor_part:Toy",
    )
    install(
        tmp_path,
        "vendor_lost",
        TOY + "        availability = classmethod(lambda cls: 1 / 0)\n",
        lost="vendor_lost:Toy",
    )
    install(
        tmp_path,
        "vendor_stops",
        "class Stop(BaseException): pass\nraise Stop('at import')",
        stops="vendor_stops:Toy",
    )
    install(
        tmp_path,
        "vendor_mute",
        "class E(Exception):\n    __str__ = None\nraise E()",
        mute="vendor_mute:Toy",
    )
    install(
        tmp_path,
        "vendor_lazy",
        TOY + "        device_type = type('Lazy', (), {'__get__': lambda *given: 1 / 0})()\n",
        lazy="vendor_lazy:Toy",
    )
    for name, answer in ANSWERS.items():
        source = TOY + f"        availability = classmethod(lambda cls: {answer})\n"
        install(tmp_path, f"vendor_{name}", source, **{name: f"vendor_{name}:Toy"})
    install(tmp_path, "vendor_text", TOY + "        contract_version = '1'\n", text="vendor_text:Toy")
    install(tmp_path, "vendor_one", TOY, twice="vendor_one:Toy")
    install(tmp_path, "vendor_two", TOY, twice="vendor_two:Toy")

    reports = ask(tmp_path).reports

    own = {name for name, report in ask_without(tmp_path).reports.items() if not report["usable"]}
    reasons = {
        name: str(report["reason"])
        for name, report in reports.items()
        if not report["usable"] and name not in own
    }
    expected = {
        "library": "No module named 'no_such_library'",
        "raises": "OSError: driver not loaded",
        "asserts": "AssertionError: unsupported",
        "exits": "SystemExit: no licence",
        "absent": "No module named 'vendor_nowhere'",
        "nothing": "Toy",
        "other": "not a subclass of eplb_platform.backend.Backend",
        "old": "version 0 of the contract, not 1",
        "part": "lacks abort",
        "lost": "availability() fails: ZeroDivisionError",
        "stops": "fails to import: Stop: at import",
        "mute": "fails to import: E: (its message cannot be had: TypeError)",
        "lazy": "cannot be looked at: ZeroDivisionError",
        "none": "availability() fails: TypeError: expected an Availability, got None",
        "list": "expected versions to be a mapping, got ['3.1']",
        "unsure": "expected usable to be True or False, got 'yes'",
        "wordless": "no reason given",
        "broken": "availability() fails: RuntimeError: no versions",
        "text": "version '1' of the contract, not 1",
        "twice": "offered 2 times (vendor_one:Toy, vendor_two:Toy)",
    }
    assert reasons.keys() == expected.keys()
    for name, text in expected.items():
        assert text in reasons[name]
        assert "\n" not in reasons[name]
    assert reports["cpu"]["usable"]
    assert reports["good"]["usable"]
    assert reports["good"]["versions"] == {"toy": "3.1"}


def test_the_command_prints_one_list_whatever_vendors_print(tmp_path: Path) -> None:
    noise = "import os\nprint('banner')\nos.write(1, b'banner of C code')\n"
    install(tmp_path, "vendor_loud", noise + dedent(TOY), loud="vendor_loud:Toy")
    typed = TOY.replace('{"toy": "3.1"}', '{"toy": 3, "driver": None}')
    install(tmp_path, "vendor_typed", typed, typed="vendor_typed:Toy")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "from eplb_platform.cli import main; main()", "backends", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    reports = {report["name"]: report for report in json.loads(done.stdout)}
    assert done.stderr.count("banner") == 2
    keys = {"name", "device_type", "collective", "usable", "reason", "versions"}
    assert all(report.keys() == keys for report in reports.values())
    assert reports["loud"]["usable"] and reports["cpu"]["usable"]
    assert reports["typed"]["versions"] == {"toy": "3", "driver": "None"}


def test_a_backend_that_takes_long_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def discover(on_examine: Callable[[str], None]) -> list[object]:
        for name, takes_s in (("quick", 0.0), ("hanging", 2.5), ("last", 0.0)):
            on_examine(name)
            time.sleep(takes_s)
        return []

    monkeypatch.setattr(eplb_platform.backend, "discover_backends", discover)
    monkeypatch.setattr(listing, "_SLOW_S", 1.0)
    assert listing.examine_backends() == []
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "backend 'hanging' is still being imported after 1 s\n"


def test_loading_by_name_imports_no_other_backend(tmp_path: Path) -> None:
    install(tmp_path, "vendor_a", TOY, a="vendor_a:Toy")
    install(tmp_path, "vendor_b", TOY, b="vendor_b:Toy")
    assert ask(tmp_path, 'load_backend("a")').imported == ["vendor_a"]


def test_a_broken_backend_says_why_when_it_is_loaded(tmp_path: Path) -> None:
    install(tmp_path, "vendor_library", "import no_such_library", library="vendor_library:Toy")
    [loaded] = ask(tmp_path, 'load_backend("library")').loaded
    assert loaded.startswith(
        "BackendError: backend 'library' cannot be used: vendor_library:Toy fails to import"
    )


def test_auto_picks_by_device_type_and_leaves_a_choice_between_two_to_the_user(tmp_path: Path) -> None:
    install(tmp_path, "vendor_a", TOY, a="vendor_a:Toy")
    answer = ask(tmp_path, 'load_backend(device_type="toy")', "load_backend()")
    assert answer.loaded == ["Toy", "CpuBackend"]
    install(tmp_path, "vendor_b", TOY, b="vendor_b:Toy")
    [loaded] = ask(tmp_path, 'load_backend(device_type="toy")').loaded
    assert loaded == "BackendError: 2 backends are for toy: name one of a, b"
