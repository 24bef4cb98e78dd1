"""A Hugging Face Qwen3-MoE checkpoint folder, read tensor by tensor and expert by expert.

Nothing is read before it is asked for: a rank touches the bytes of its own experts only. Layouts: one
`model.safetensors` or shards with `model.safetensors.index.json`; experts one by one, as the hub has them,
or fused per layer, as transformers 5 holds them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

import torch
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A folder does not hold what is needed; the message says file, key and what was expected."""


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of the experts of one checkpoint."""

    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def gate_up(self) -> tuple[int, int]:
        """Shape of an expert's gate and up projection, gate first: [2 * intermediate, hidden]."""
        return 2 * self.intermediate_size, self.hidden_size

    @property
    def down(self) -> tuple[int, int]:
        """Shape of an expert's down projection: [hidden, intermediate]."""
        return self.hidden_size, self.intermediate_size


def read_config(folder: Path) -> dict[str, object]:
    """`config.json` of a Qwen3-MoE checkpoint. Raises CheckpointError for anything else."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected a Qwen3-MoE model's configuration: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    if config.get("model_type") != "qwen3_moe":
        raise CheckpointError(f"{path}: model_type: expected 'qwen3_moe', found {config.get('model_type')!r}")
    return config


class CheckpointFolder:
    """The tensors of a folder by key. A context manager; the files stay open, memory-mapped, inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, safe_open] = {}
        self._file_of_key = self._index()

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()

    def __contains__(self, key: str) -> bool:
        return key in self._file_of_key

    def read(self, key: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor `key`, which must have `shape`, in the data type of the file."""
        return self._slice(key, shape)[...]

    def read_row(self, key: str, row: int, shape: Sequence[int]) -> torch.Tensor:
        """Row `row` of the tensor `key`, which must have `shape`; reads no other row."""
        return self._slice(key, shape)[row]

    def _index(self) -> dict[str, Path]:
        single, index = self.folder / SINGLE_FILE, self.folder / INDEX_FILE
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        if not index.is_file():
            raise CheckpointError(f"{self.folder}: expected {SINGLE_FILE} or {INDEX_FILE} in this folder")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(key): self.folder / file for key, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            expected = f"expected an object of keys and file names ({error!r})"
            raise CheckpointError(f"{index}: weight_map: {expected}") from error

    def _open(self, path: Path) -> safe_open:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: expected a readable safetensors file: {error}") from error
        return self._files[path]

    def _slice(self, key: str, shape: Sequence[int]) -> torch.Tensor:
        expected = f"{key}: expected a tensor of shape {list(shape)}"
        if key not in self._file_of_key:
            raise CheckpointError(f"{self.folder}: {expected}, there is none")
        path = self._file_of_key[key]
        try:
            # Not a tensor, but indexed like one, and reads only what is indexed.
            values = self._open(path).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {expected}: {error}") from error
        found: list[int] = values.get_shape()
        if found != list(shape):
            raise CheckpointError(f"{path}: {expected}, found {found}")
        return cast(torch.Tensor, values)


class ExpertReader:
    """The experts of one MoE layer, in whichever layout the folder has them."""

    def __init__(self, checkpoint: CheckpointFolder, layer: int, shape: ExpertShape) -> None:
        """`layer`: index of the model's layer. Raises CheckpointError when an expert of it is missing."""
        self._checkpoint = checkpoint
        self._shape = shape
        self._prefix = f"model.layers.{layer}.mlp.experts"
        self._fused = f"{self._prefix}.gate_up_proj" in checkpoint
        for key in self._keys():
            if key not in checkpoint:
                expected = f"expected, for a model of {shape.num_experts} experts"
                raise CheckpointError(f"{checkpoint.folder}: {key}: {expected}; there is none")

    def _keys(self) -> list[str]:
        if self._fused:
            return [f"{self._prefix}.gate_up_proj", f"{self._prefix}.down_proj"]
        experts = range(self._shape.num_experts)
        return [f"{self._prefix}.{e}.{part}_proj.weight" for e in experts for part in ("gate", "up", "down")]

    def read(self, expert: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Copy one expert into `gate_up` [2 * intermediate, hidden] and `down` [hidden, intermediate]."""
        shape, read = self._shape, self._checkpoint.read
        if self._fused:
            row = self._checkpoint.read_row
            gate_up.copy_(row(f"{self._prefix}.gate_up_proj", expert, (shape.num_experts, *shape.gate_up)))
            down.copy_(row(f"{self._prefix}.down_proj", expert, (shape.num_experts, *shape.down)))
            return
        half = (shape.intermediate_size, shape.hidden_size)
        gate_up[: half[0]].copy_(read(f"{self._prefix}.{expert}.gate_proj.weight", half))
        gate_up[half[0] :].copy_(read(f"{self._prefix}.{expert}.up_proj.weight", half))
        down.copy_(read(f"{self._prefix}.{expert}.down_proj.weight", shape.down))
