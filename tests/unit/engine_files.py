"""Files as other engines write them, made from what is known of their writers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

Load = NDArray[np.int64]


def tensorrt_llm_statistics(
    folder: Path, load: Load, *, ep_size: int = 2, first_iteration: int = 100, first_layer: int = 3
) -> Path:
    """What EXPERT_STATISTIC_ITER_RANGE makes each rank dump; load: [iterations, layers, experts]."""
    folder.mkdir(parents=True)
    meta = {"num_experts": load.shape[2], "num_experts_per_token": 4}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    rng = np.random.default_rng(0)
    rest = load.copy()
    for rank in range(ep_size):
        # Each rank routed some of the tokens, the last one all that were left.
        part = rest if rank == ep_size - 1 else rng.binomial(rest, 1 / (ep_size - rank))
        rest = rest - part
        records = {
            f"{first_iteration + i}_{first_layer + layer}": part[i, layer]
            for i in range(load.shape[0])
            for layer in range(load.shape[1])
        }
        safetensors.numpy.save_file(records, str(folder / f"rank{rank}.safetensors"))
        pairs = {name: np.zeros((2, 2), dtype=np.int32) for name in records}
        safetensors.numpy.save_file(pairs, str(folder / f"cooccurrence_rank{rank}.safetensors"))
    return folder


def sglang_stat_dump(path: Path, load: Load, *, dense_layers: int = 0, buffer_size: int = 0) -> Path:
    """Mode stat: rank 0 dumps its buffer, in which steps may be left over, for all hidden layers."""
    steps = max(buffer_size, load.shape[0])
    count = np.zeros((steps, dense_layers + load.shape[1], load.shape[2]), dtype=np.int32)
    count[: load.shape[0], dense_layers:] = load
    dump = {"rank": 0, "logical_count": torch.from_numpy(count), "average_utilization_rate_over_window": 0.5}
    torch.save(dump, path)
    return path


def sglang_pass_dumps(folder: Path, load: Load, physical_to_logical: Load) -> Path:
    """Mode per_pass: a file for each of two ranks; every rank counted a part of the physical experts.

    physical_to_logical: [layers, physical] on two ranks; all tokens of an expert go to its first slot
    """
    folder.mkdir(parents=True)
    physical = np.zeros((load.shape[0], *physical_to_logical.shape), dtype=np.int32)
    for layer, row in enumerate(physical_to_logical):
        for expert in range(load.shape[2]):
            physical[:, layer, np.flatnonzero(row == expert)[0]] = load[:, layer, expert]
    half = physical.shape[2] // 2
    for rank in range(2):
        mine = np.zeros_like(physical)
        mine[:, :, rank * half : (rank + 1) * half] = physical[:, :, rank * half : (rank + 1) * half]
        records = [
            {
                "forward_pass_id": 7 + step,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.from_numpy(mine[step].copy()),
            }
            for step in range(load.shape[0])
        ]
        dump = {"records": records, "last_physical_to_logical_map": torch.from_numpy(physical_to_logical)}
        torch.save(dump, folder / f"expert_distribution_recorder_1700000000.{rank}_{rank}.pt")
    return folder
