"""`eplb demo`: options in, progress on standard error, table or JSON on standard output, exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

from eplb_platform.cli import BadInput, bad_input
from eplb_platform.demo.settings import CheckedSettings, DemoSettings, check

FAILED = 1
NEEDED = ("transformers", "matplotlib")


def demonstrate(given: Mapping[str, object], quick: bool, as_json: bool) -> int:
    """Run the demo with the options that were given; 0 when balancing kept its promises, 1 when not."""
    settings = _check(given, quick)
    from eplb_platform.demo.processes import RankFailed, start_importing

    start_importing()
    try:
        return _run(settings, as_json)
    except RankFailed as failure:
        from eplb_platform.demo.run import log_path

        message = " ".join(str(failure).split())
        print(f"eplb: demo: {message} (more in {log_path(settings)})", file=sys.stderr)
        return FAILED


def _check(given: Mapping[str, object], quick: bool) -> CheckedSettings:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise BadInput(f"demo: {' and '.join(missing)} not installed: pip install 'eplb_platform[demo]'")
    options = DemoSettings().quick() if quick else DemoSettings()
    try:
        # The names come from the command's own options.
        checked = check(replace(options, **given))  # type: ignore[arg-type]
        _check_backend(checked.options.backend)
    except (ValueError, RuntimeError) as error:
        raise bad_input("demo", error) from error
    return checked


def _check_backend(name: str) -> None:
    from eplb_platform.backend import load_backend

    load_backend(name)


def _run(settings: CheckedSettings, as_json: bool) -> int:
    from rich.console import Console

    from eplb_platform.demo.display import Display
    from eplb_platform.demo.picture import draw
    from eplb_platform.demo.report import LEGEND, table, unequal_legend, unequal_table
    from eplb_platform.demo.report import as_json as result_as_json
    from eplb_platform.demo.run import log_path, run_demo

    log = log_path(settings)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    errors = Console(stderr=True)
    with Display(errors, settings.options.ranks) as display:
        result = run_demo(settings, display)
    if not log.stat().st_size:
        log.unlink()
    draw(result)
    if as_json:
        print(json.dumps(result_as_json(result)))
    else:
        Console().print(table(result))
        print(LEGEND)
        Console().print(unequal_table(result))
        print(unequal_legend(result))
        print(f"tokens identical in all phases: {'no' if result.different_tokens else 'yes'}")
        print(f"picture: {settings.options.picture}   map: {settings.options.expert_map_record_path}")
    for phase in [*result.phases.values(), *result.unequal.values()]:
        if phase.failed_cycles:
            print(
                f"eplb: demo: phase {phase.name}: {phase.failed_cycles} cycles failed ({log})",
                file=sys.stderr,
            )
    for fault in result.faults:
        print(f"eplb: demo: {fault}", file=sys.stderr)
    return FAILED if result.faults else 0
