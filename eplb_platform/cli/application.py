"""The commands and their options. What a command needs is imported when it runs, so that `--help` stays quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from eplb_platform.cli import BAD_INPUT, BadInput

application = typer.Typer(
    name="eplb",
    help="Expert parallelism load balancing for mixture-of-experts models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output, for machines.")]


@application.callback()
def eplb() -> None:
    """Expert parallelism load balancing for mixture-of-experts models."""


@application.command()
def backends(as_json: AsJson = False) -> None:
    """List the backends that are installed, and whether this machine can run them."""
    from dataclasses import asdict

    from eplb_platform.backend import discover_backends

    reports = discover_backends()
    if as_json:
        typer.echo(json.dumps([{**asdict(report), "versions": dict(report.versions)} for report in reports]))
        return
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        state = "usable" if report.usable else f"not usable: {report.reason}"
        typer.echo(f"{report.name:10} {report.device_type:6} {report.collective:6} {state}  {versions}".rstrip())


@application.command()
def validate(
    map_file: Annotated[Path, typer.Argument(metavar="MAP", help="An expert map (JSON).")],
    ranks: Annotated[int | None, typer.Option(min=1, help="The number of ranks it must be for.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="The number of logical experts in a layer.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="The number of mixture-of-experts layers.")] = None,
    as_json: AsJson = False,
) -> int:
    """Check an expert map and print every fault, one line each with its place in the file."""
    from eplb_platform.cli.validation import check

    outcome = check(map_file, ranks=ranks, experts=experts, layers=layers)
    if as_json:
        typer.echo(json.dumps(outcome.as_dict()))
    else:
        for line in outcome.lines():
            typer.echo(line, err=not outcome.valid)
    return 0 if outcome.valid else BAD_INPUT
