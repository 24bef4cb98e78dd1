"""Compiled kernels that tell what experts have in common from what each does by chance.

Loads are [experts, windows] in mean rank loads of each window, C-contiguous and writable (a read-only array
is another type to numba and would compile again).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_platform.jit import kernel

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@kernel
def strong_directions(rows: Floats) -> Floats:
    """The projection [rows, rows] onto the directions in which `rows` [rows, columns] vary more than noise.

    Directions by the cyclic Jacobi method; noise ends at a multiple of the median singular value (Gavish and
    Donoho, "The optimal hard threshold for singular values is 4/sqrt(3)", arXiv:1305.5870).
    """
    num_rows, num_columns = rows.shape
    gram = np.zeros((num_rows, num_rows))
    for row in range(num_rows):
        for other in range(row + 1):
            total = 0.0
            for column in range(num_columns):
                total += rows[row, column] * rows[other, column]
            gram[row, other] = gram[other, row] = total
    vectors = np.eye(num_rows)
    scale = 0.0
    for row in range(num_rows):
        scale += gram[row, row]
    for _ in range(12):
        largest = 0.0
        for row in range(num_rows - 1):
            for other in range(row + 1, num_rows):
                off = gram[row, other]
                largest = max(largest, abs(off))
                if abs(off) <= 1e-9 * scale:
                    continue
                ratio = (gram[other, other] - gram[row, row]) / (2 * off)
                tangent = 1.0 / (abs(ratio) + np.sqrt(ratio * ratio + 1))
                if ratio < 0:
                    tangent = -tangent
                cosine = 1.0 / np.sqrt(tangent * tangent + 1)
                sine = tangent * cosine
                for index in range(num_rows):
                    first, second = gram[index, row], gram[index, other]
                    gram[index, row] = cosine * first - sine * second
                    gram[index, other] = sine * first + cosine * second
                for index in range(num_rows):
                    first, second = gram[row, index], gram[other, index]
                    gram[row, index] = cosine * first - sine * second
                    gram[other, index] = sine * first + cosine * second
                    first, second = vectors[index, row], vectors[index, other]
                    vectors[index, row] = cosine * first - sine * second
                    vectors[index, other] = sine * first + cosine * second
        if largest <= 1e-8 * scale:
            break
    values = np.empty(num_rows)
    for row in range(num_rows):
        values[row] = np.sqrt(max(gram[row, row], 0.0))
    median = 0.0
    for row in range(num_rows):
        below = 0
        for other in range(num_rows):
            below += values[other] < values[row] or (values[other] == values[row] and other < row)
        # The mean was taken away, which leaves one direction empty.
        if below == (num_rows + 1) // 2:
            median = values[row]
    aspect = min(num_rows, num_columns) / max(num_rows, num_columns)
    edge = 0.56 * aspect**3 - 0.95 * aspect**2 + 1.82 * aspect + 1.43
    threshold = edge * median
    projection = np.zeros((num_rows, num_rows))
    for direction in range(num_rows):
        if values[direction] > threshold:
            for row in range(num_rows):
                for other in range(num_rows):
                    projection[row, other] += vectors[row, direction] * vectors[other, direction]
    return projection


@kernel
def without_noise(load: Floats, weight: Floats, kept: float, smooth: Floats) -> None:
    """Set `smooth` to `load` [experts, windows] with `kept` of what varies in no direction common to many.

    Experts that rise and fall together will do so again; what each does alone is mostly chance.
    """
    num_experts, num_windows = load.shape
    rows = np.empty((num_windows, num_experts))
    mean = np.zeros(num_experts)
    for expert in range(num_experts):
        for window in range(num_windows):
            mean[expert] += weight[window] * load[expert, window]
        for window in range(num_windows):
            rows[window, expert] = np.sqrt(weight[window]) * (load[expert, window] - mean[expert])
    projection = strong_directions(rows)
    for window in range(num_windows):
        for expert in range(num_experts):
            common = 0.0
            for other in range(num_windows):
                common += projection[window, other] * rows[other, expert]
            varies = common + kept * (rows[window, expert] - common)
            if weight[window] > 0:
                smooth[expert, window] = max(mean[expert] + varies / np.sqrt(weight[window]), 0.0)
            else:
                smooth[expert, window] = load[expert, window]


@kernel
def spread_of_ranks(load: Floats, weight: Floats, num_ranks: int) -> float:
    """How much a rank's load varies between windows, in mean rank loads, where experts vary independently."""
    num_experts, num_windows = load.shape
    variance = 0.0
    for expert in range(num_experts):
        mean, square = 0.0, 0.0
        for window in range(num_windows):
            mean += weight[window] * load[expert, window]
            square += weight[window] * load[expert, window] ** 2
        variance += max(square - mean * mean, 0.0)
    return float(np.sqrt(variance / num_ranks))


@kernel
def smooth_layers(
    load: NDArray[np.float64], weight: Floats, num_ranks: int, kept: float, most: int
) -> tuple[NDArray[np.float64], Ids]:
    """What to plan on, and the squarings that suit the noise of each layer: p about 2 / spread of a rank.

    load: [layers, experts, windows]; weight: [layers, windows]. Fewer than 8 windows are taken as they are.
    """
    num_layers, _, num_windows = load.shape
    squarings = np.full(num_layers, most, np.int64)
    smooth = load.copy()
    if num_windows >= 8:
        for layer in range(num_layers):
            spread = spread_of_ranks(load[layer], weight[layer], num_ranks)
            squarings[layer] = 3
            while squarings[layer] < most and 2.0 ** (squarings[layer] + 0.5) * spread < 2.0:
                squarings[layer] += 1
            if spread > 1e-6:
                without_noise(load[layer], weight[layer], kept, smooth[layer])
    return smooth, squarings
