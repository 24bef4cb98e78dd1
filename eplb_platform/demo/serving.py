"""One rank's serving loop: prefill a batch, decode it greedily, take the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_platform.demo.schedule import RankBatch
from eplb_platform.heat import Phase

if TYPE_CHECKING:
    from eplb_platform.integrations.transformers import ExpertParallelModel

AfterForward = Callable[[NDArray[np.int64], Phase], None]
"""Called once after every forward pass with its load [layers, physical] on this rank."""


@dataclass
class Served:
    """What one rank produced and measured in a phase."""

    tokens: list[NDArray[np.uint8]]
    """Per batch: [sequences, forwards]."""
    load: NDArray[np.int32]
    """[forwards, layers, physical]: tokens that this rank sent to each slot."""
    forward_ms: NDArray[np.float64]
    """[forwards], the balancer's step included."""


@torch.inference_mode()
def serve(model: ExpertParallelModel, batches: Sequence[RankBatch], after_forward: AfterForward) -> Served:
    """Serve all batches. Every rank must be given batches of the same shapes."""
    steps = sum(batch.forwards for batch in batches)
    expert_map = model.expert_map
    served = Served(
        tokens=[],
        load=np.zeros((steps, expert_map.num_layers, expert_map.num_physical_experts), dtype=np.int32),
        forward_ms=np.zeros(steps),
    )
    step = 0
    for batch in batches:
        served.tokens.append(_serve_batch(model, batch, served, step, after_forward))
        step += batch.forwards
    return served


def _serve_batch(
    model: ExpertParallelModel, batch: RankBatch, served: Served, first_step: int, after_forward: AfterForward
) -> NDArray[np.uint8]:
    tokens = np.empty((len(batch.prompts), batch.forwards), dtype=np.uint8)
    inputs = torch.from_numpy(batch.prompts.astype(np.int64)).to(model.module.device)
    cache: object | None = None
    for position in range(batch.forwards):
        started = time.perf_counter()
        output = model.module(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        inputs = output.logits[:, -1].argmax(-1, keepdim=True)
        load = model.take_load()
        after_forward(load, Phase.DECODE if position else Phase.PREFILL)
        tokens[:, position] = inputs[:, 0].cpu().numpy()
        served.load[first_step + position] = load
        served.forward_ms[first_step + position] = (time.perf_counter() - started) * 1e3
    return tokens
