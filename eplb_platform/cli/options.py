"""Options that several commands have, and how what they hold is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eplb_platform.limits import MOST_RANKS

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON value on standard output, for machines.")
]

IterRange = Annotated[
    str | None, typer.Option(metavar="A-B", help="Iterations from A up to B, without B.", show_default="all")
]
Trace = Annotated[Path, typer.Argument(metavar="TRACE", help="Recorded load, of any engine.")]
EpSize = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_RANKS, help="The number of ranks.", show_default="what the record says"),
]
NumNodes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Nodes that the ranks stand on.", show_default="by the hardware's ranks per node"
    ),
]
ExpertGroups = Annotated[int, typer.Option(min=1, help="Expert groups of the model's router.")]
Hardware = Annotated[
    str, typer.Option(metavar="NAME|FILE.yaml", help="h100, ascend910b, or a profile of your own.")
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=NUMBER",
        help="The model's shape, as hidden_size=4096, in place of the profile's; repeatable.",
        show_default="DeepSeek-R1",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="vllm-ascend, tensorrt-llm, sglang, vllm (maps); trace, tensorrt-llm, sglang (recorded load).",
        show_default="what the file looks like",
    ),
]


def names(text: str | None) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
