"""A simulation as a picture: balancedness and time of the steps, contender beside contender."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from eplb_platform.offline.report_picture import COLOURS
from eplb_platform.offline.simulate import Result
from eplb_platform.records.atomic import write_atomically

POINTS = 200
"""A curve has at most so many points, each the mean of neighbouring steps."""


def draw(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG, atomically. Raises ImportError without matplotlib, OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for i, result in enumerate(results):
        pieces = np.array_split(np.arange(len(result.step_s)), min(POINTS, len(result.step_s)))
        middle = [float(piece.mean()) for piece in pieces]
        for axes, values in ((above, result.balancedness), (below, result.step_s * 1e3)):
            means = [float(values[piece].mean()) for piece in pieces]
            axes.plot(middle, means, color=COLOURS[i % len(COLOURS)], label=result.name, linewidth=1.2)
    above.set(ylabel="mean / max rank load", ylim=(0, 1.02))
    above.set_title("Balancedness of the judged steps, 1 is perfect", loc="left")
    above.legend(loc="lower right")
    below.set(xlabel="judged step", ylabel="ms, estimated", ylim=(0, None))
    below.set_title("Time of a step, with waits and swaps", loc="left")

    def write_to(file: BinaryIO) -> None:
        figure.savefig(file, dpi=110, format="png")

    write_atomically(Path(path), write_to)
