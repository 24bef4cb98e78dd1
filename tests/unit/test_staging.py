"""The staging says how much memory it takes, keeps to it, and refuses weights that do not fit together."""

from __future__ import annotations

import pytest
import torch

from eplb_backends.cpu import CpuBackend
from eplb_platform.migration.staging import Staging, StagingError

NUM_LAYERS, SLOTS = 3, 4
EXPERT_BYTES = 1000 * 4 + 500 * 2 + 1


def weights(*, as_list: bool = False) -> list[list[torch.Tensor | list[torch.Tensor]]]:
    """Per layer: 1000 float32, 500 bfloat16 and one int8 per expert."""
    layers = []
    for _ in range(NUM_LAYERS):
        stacked = [
            torch.zeros(SLOTS, 10, 100),
            torch.zeros(SLOTS, 500, dtype=torch.bfloat16),
            torch.zeros(SLOTS, 1, dtype=torch.int8),
        ]
        layers.append([list(parameter.unbind()) if as_list else parameter for parameter in stacked])
    return layers


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("layers_per_chunk", [1, 2, 10])
def test_by_default_a_chunk_of_whole_layers_fits(layers_per_chunk: int, as_list: bool) -> None:
    staging = Staging(
        CpuBackend(), weights(as_list=as_list), max_bytes=None, layers_per_chunk=layers_per_chunk
    )
    assert staging.slots == min(layers_per_chunk, NUM_LAYERS) * SLOTS
    assert staging.expert_bytes == EXPERT_BYTES
    assert staging.nbytes == staging.slots * EXPERT_BYTES
    shapes = [[(tuple(row.shape), row.dtype) for row in rows] for rows in staging.buffers]
    assert shapes == [
        [((10, 100), torch.float32)] * staging.slots,
        [((500,), torch.bfloat16)] * staging.slots,
        [((1,), torch.int8)] * staging.slots,
    ]


def test_the_memory_stays_below_what_the_user_gave() -> None:
    staging = Staging(CpuBackend(), weights(), max_bytes=3 * EXPERT_BYTES + 4999, layers_per_chunk=2)
    assert staging.slots == 3
    assert staging.nbytes == 3 * EXPERT_BYTES
    assert str(staging) == "staging for 3 experts of 5,001 bytes: 0.0 MB"


def test_more_than_a_chunk_can_need_is_not_taken() -> None:
    staging = Staging(CpuBackend(), weights(), max_bytes=10**9, layers_per_chunk=1)
    assert staging.slots == SLOTS


def test_less_than_one_expert_is_refused_with_the_least_that_works() -> None:
    large = [[torch.empty(2, 1_500_000)]]
    message = (
        r"staging_memory_mb=5 does not hold one expert \(6,000,000 bytes in 1 parameters\): give at least 6"
    )
    with pytest.raises(StagingError, match=message):
        Staging(CpuBackend(), large, max_bytes=5_000_000, layers_per_chunk=1)
    assert Staging(CpuBackend(), large, max_bytes=6_000_000, layers_per_chunk=1).slots == 1


def test_layers_that_differ_are_named() -> None:
    layers = weights()
    layers[2][1] = torch.zeros(SLOTS, 501, dtype=torch.bfloat16)
    with pytest.raises(
        StagingError, match=r"layer 2, parameter 1 is torch.bfloat16 \[501\].*\[500\] in layer 0"
    ):
        Staging(CpuBackend(), layers, max_bytes=None, layers_per_chunk=1)
    layers = weights(as_list=True)
    layers[1][2] = [torch.zeros(1, dtype=torch.int8)] * 3 + [torch.zeros(1, dtype=torch.uint8)]
    with pytest.raises(StagingError, match=r"layer 1, parameter 2 is torch.int8 \[1\], torch.uint8 \[1\]"):
        Staging(CpuBackend(), layers, max_bytes=None, layers_per_chunk=1)
    layers = weights()
    layers[1][0] = torch.zeros(SLOTS + 1, 10, 100)
    with pytest.raises(StagingError, match="layer 1, parameter 0 has 5 slots, but 4 in layer 0"):
        Staging(CpuBackend(), layers, max_bytes=None, layers_per_chunk=1)
    layers = weights()
    del layers[1][2]
    with pytest.raises(StagingError, match="layer 1 has 2 expert parameters, layer 0 has 3"):
        Staging(CpuBackend(), layers, max_bytes=None, layers_per_chunk=1)


def test_no_weights_at_all_are_refused() -> None:
    with pytest.raises(StagingError, match="no expert weights"):
        Staging(CpuBackend(), [], max_bytes=None, layers_per_chunk=1)
    with pytest.raises(StagingError, match="no slots"):
        Staging(CpuBackend(), [[[]]], max_bytes=None, layers_per_chunk=1)
