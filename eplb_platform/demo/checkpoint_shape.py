"""What the demo must know of a checkpoint folder before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eplb_platform.integrations.checkpoint_folder import CheckpointFolder, read_config

BYTE_VOCABULARY = 256


@dataclass(frozen=True)
class CheckpointShape:
    """The numbers of a Qwen3-MoE checkpoint that a placement depends on."""

    num_layers: int
    """Mixture-of-experts layers only."""
    num_logical_experts: int
    max_positions: int


def read_shape(folder: Path) -> CheckpointShape:
    """The shape of a Qwen3-MoE checkpoint with a byte vocabulary; ValueError says what else the folder is."""
    config = read_config(folder)
    if config.get("vocab_size") != BYTE_VOCABULARY:
        raise ValueError(
            f"{folder}: vocab_size is {config.get('vocab_size')!r}, expected {BYTE_VOCABULARY} (bytes)"
        )
    with CheckpointFolder(folder):
        pass
    # transformers 5 writes the number of experts under another name than the hub's checkpoints have.
    experts = "num_experts" if "num_experts" in config else "num_local_experts"
    return CheckpointShape(
        num_layers=len(_moe_layers(config, folder)),
        num_logical_experts=_positive(config, experts, folder),
        max_positions=_positive(config, "max_position_embeddings", folder, default=32768),
    )


def _moe_layers(config: dict[str, object], folder: Path) -> list[int]:
    """Layers with experts, by the rule of Hugging Face's Qwen3-MoE."""
    step = _positive(config, "decoder_sparse_step", folder, default=1)
    listed = config.get("mlp_only_layers")
    dense = listed if isinstance(listed, list) else []
    layers = range(_positive(config, "num_hidden_layers", folder))
    sparse = [layer for layer in layers if (layer + 1) % step == 0 and layer not in dense]
    if not sparse:
        raise ValueError(f"{folder}: the model has no mixture-of-experts layer")
    return sparse


def _positive(config: dict[str, object], key: str, folder: Path, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{folder}: config.json: {key} is {value!r}, expected a whole number of at least 1")
    return value
