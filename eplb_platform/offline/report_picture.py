"""The report as a picture: the hottest experts of every layer, and balancedness under each layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from eplb_platform.offline.report import Report
from eplb_platform.records.atomic import write_atomically

# Colours that people with a colour vision deficiency can tell apart (Okabe and Ito).
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG, atomically. Raises ImportError without matplotlib, OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(1.3, 1))
    mean = report.expert_load.mean(axis=1, keepdims=True)
    relative = np.divide(report.expert_load, mean, out=np.zeros_like(report.expert_load), where=mean > 0)
    layers, experts = relative.shape
    extent = (-0.5, experts - 0.5, report.first_layer + layers - 0.5, report.first_layer - 0.5)
    image = above.imshow(relative, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
    figure.colorbar(image, ax=above, label="load / mean expert load")
    above.set(xlabel="expert", ylabel="layer")
    above.set_title(f"Expert load over {report.num_steps} steps", loc="left")
    numbers = report.first_layer + np.arange(layers)
    for i, layout in enumerate(report.layouts):
        average = layout.overall.balancedness.mean()
        below.plot(
            numbers,
            layout.overall.balancedness,
            marker=".",
            color=COLOURS[i % len(COLOURS)],
            label=f"{layout.name}: {average:.3f}",
        )
    below.set(xlabel="layer", ylabel="mean / max rank load", ylim=(0, 1.02))
    for axis in (above.yaxis, above.xaxis, below.xaxis):
        axis.get_major_locator().set_params(integer=True)
    below.set_title("Balancedness, 1 is perfect", loc="left")
    if report.layouts:
        below.legend(loc="lower right")

    def write_to(file: BinaryIO) -> None:
        figure.savefig(file, dpi=110, format="png")

    write_atomically(Path(path), write_to)
