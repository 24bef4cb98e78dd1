"""How commands print tables and lines through rich."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def right_aligned(*columns: str) -> Table:
    """A table whose rows begin with a name, with numbers to its right."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def plain_lines(console: Console, *lines: str) -> None:
    """Lines as they are: neither markup nor colours nor breaks are put in."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
