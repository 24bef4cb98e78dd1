"""Room for arrays that may be larger than the memory."""

from __future__ import annotations

import tempfile
from math import prod

import numpy as np
from numpy.typing import NDArray

# An array above this lies in a nameless temporary file.
MAX_MEMORY_BYTES = 1 << 28


def zeros(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """An array of zeros; in a file that is gone with it when it is large. Raises OSError without space."""
    if prod(shape) * 8 <= MAX_MEMORY_BYTES:
        return np.zeros(shape, dtype=np.int64)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.int64, mode="w+", shape=shape)
