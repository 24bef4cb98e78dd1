"""The picture of the demo: how hot each rank is over time, without balancing and with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_platform.demo.run import DemoResult, PhaseResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MOST_COLUMNS = 120
MOST_LAYERS = 6
LINES = {"contiguous": ("#d55e00", "-"), "dynamic": ("#0072b2", "-"), "static": ("#222222", "--")}
"""Colours that people with a colour vision deficiency can tell apart (Okabe and Ito), and dashes besides."""


def draw(result: DemoResult) -> None:
    """Write the picture as PNG to the path that the settings name; its folder is created."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = result.settings.options.picture
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    _compose(figure, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def relative_load(phase: PhaseResult, layers: NDArray[np.int_], columns: int) -> NDArray[np.float64]:
    """[layers * ranks, columns]: load of a rank / mean of the layer's ranks, time in `columns` bins."""
    bins = np.array_split(phase.load.rank_load[:, layers], columns)
    load = np.stack([part.sum(axis=0) for part in bins], axis=-1).astype(np.float64)
    mean = load.mean(axis=1, keepdims=True)
    ratio = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return np.asarray(ratio.reshape(-1, columns))


def _compose(figure: Figure, result: DemoResult) -> None:
    shape, ranks = result.settings.shape, result.settings.options.ranks
    columns = min(MOST_COLUMNS, result.schedule.steps)
    layers = np.unique(np.linspace(0, shape.num_layers - 1, min(MOST_LAYERS, shape.num_layers)).astype(int))
    before, after = (
        relative_load(result.phases[name], layers, columns) for name in ("contiguous", "dynamic")
    )
    widest = max(float(np.abs(load - 1).max()) for load in (before, after))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 0.75))
    for axis, load, title in (
        (axes[0], before, "contiguous: experts stay where they are"),
        (axes[1], after, "dynamic: experts are replicated and moved while serving"),
    ):
        image = _heat_map(axis, load, layers, result, min(1.0, widest))
        axis.set_title(title, loc="left", fontsize=11)
    label = "rank load / mean of the ranks\n(1 = balanced)"
    figure.colorbar(
        image, ax=list(axes[:2]), label=label, aspect=30, extend="max" if widest > 1 else "neither"
    )
    _lines(axes[2], result)
    figure.suptitle(
        f"Load of {ranks} ranks while the text changes ({shape.num_layers} layers, "
        f"{shape.num_logical_experts} experts + {result.settings.redundant_experts} redundant)",
        fontsize=12,
    )


def _heat_map(
    axis: Axes, load: NDArray[np.float64], layers: NDArray[np.int_], result: DemoResult, widest: float
) -> AxesImage:
    """Rows: the ranks of each layer. White is the mean; red is hotter, blue colder, by at most `widest`."""
    ranks, rows = result.settings.options.ranks, len(load)
    image = axis.imshow(
        load,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=1 - widest,
        vmax=1 + widest,
        extent=(0, result.schedule.steps, rows, 0),
    )
    for row in range(ranks, rows, ranks):
        axis.axhline(row, color="black", linewidth=1)
    for stretch in result.schedule.stretches[1:]:
        axis.axvline(stretch.start, color="#888888", linewidth=0.8)
    axis.set_yticks(np.arange(len(layers)) * ranks + ranks / 2, [f"layer {layer}" for layer in layers])
    axis.tick_params(axis="y", length=0)
    axis.set_ylabel(f"ranks 0 to {ranks - 1} of each layer")
    return image


def _lines(axis: Axes, result: DemoResult) -> None:
    for name, (colour, dash) in LINES.items():
        balancedness = result.phases[name].load.balancedness.mean(axis=1)
        steps, smooth = _smooth(balancedness, width=max(1, len(balancedness) // 60))
        axis.plot(steps, smooth, color=colour, linestyle=dash, label=name, linewidth=1.6)
    commit = result.phases["dynamic"].first_commit
    if commit:
        axis.axvline(commit, color=LINES["dynamic"][0], linewidth=1, linestyle=":")
        _note(axis, "first commit", commit, 0.88, LINES["dynamic"][0], "left")
    for stretch in result.schedule.stretches:
        axis.axvline(stretch.start, color="#888888", linewidth=0.8)
        _note(axis, stretch.label, (stretch.start + stretch.end) / 2, 1.01, "#444444", "center")
    axis.set_ylabel("balancedness\n(mean of layers)")
    axis.set_xlabel("forward pass")
    axis.set_ylim(top=1.0)
    axis.legend(loc="center right", fontsize=9, ncols=3, framealpha=0.9)


def _note(axis: Axes, text: str, step: float, height: float, colour: str, align: str) -> None:
    """Write a small text at a forward pass and a height from 0, the bottom, to 1."""
    place = axis.get_xaxis_transform()
    axis.text(step, height, f" {text} ", transform=place, fontsize=8, color=colour, ha=align, va="bottom")


def _smooth(values: NDArray[np.float64], width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of `width` neighbouring forward passes, and the middle of each such window."""
    mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return np.arange(len(mean), dtype=np.float64) + width / 2, np.asarray(mean, dtype=np.float64)
