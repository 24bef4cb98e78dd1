"""What a command found, for people or as JSON, and how far it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console


class AsDict(Protocol):
    """What a command found, for machines."""

    def as_dict(self) -> Mapping[str, object]: ...


class AsLines(AsDict, Protocol):
    """For people, a text."""

    def lines(self) -> Iterable[str]: ...


class AsTables(AsDict, Protocol):
    """For people, tables that fit the terminal."""

    def print(self, console: Console) -> None: ...


def show_lines(outcome: AsLines, as_json: bool) -> None:
    """Print the outcome on standard output."""
    if as_json:
        typer.echo(json.dumps(outcome.as_dict()))
        return
    for line in outcome.lines():
        typer.echo(line)


def show_tables(outcome: AsTables, as_json: bool) -> None:
    """Print the outcome on standard output."""
    if as_json:
        typer.echo(json.dumps(outcome.as_dict()))
        return
    from rich.console import Console

    outcome.print(Console())


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, where that is a terminal: told what is done now, how much, and of how much."""
    from rich.console import Console
    from rich.progress import Progress

    shown = Console(stderr=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
