"""What a Qwen3-MoE checkpoint folder may look like, and what is said about one that will not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eplb_platform.demo
from eplb_platform.integrations.checkpoint_folder import (
    CheckpointError,
    CheckpointFolder,
    ExpertReader,
    ExpertShape,
    read_config,
)

SHAPE = ExpertShape(num_experts=4, hidden_size=6, intermediate_size=5)
DEMO = Path(eplb_platform.demo.__file__).parent
MEBIBYTE = 2**20

Tensors = dict[str, torch.Tensor]


def hub_tensors(layer: int = 1) -> Tensors:
    """One layer's experts, one tensor for each expert and projection, in bfloat16."""
    generator = torch.Generator().manual_seed(layer)
    half, down = (SHAPE.intermediate_size, SHAPE.hidden_size), SHAPE.down
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": torch.randn(
            shape, generator=generator
        ).bfloat16()
        for expert in range(SHAPE.num_experts)
        for part, shape in (("gate", half), ("up", half), ("down", down))
    }


def fused_tensors(layer: int = 1) -> Tensors:
    """The same experts as transformers 5 holds them."""
    prefix, single = f"model.layers.{layer}.mlp.experts", hub_tensors(layer)

    def stacked(part: str) -> torch.Tensor:
        return torch.stack([single[f"{prefix}.{e}.{part}_proj.weight"] for e in range(SHAPE.num_experts)])

    gate_up = torch.cat((stacked("gate"), stacked("up")), dim=1)
    return {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": stacked("down")}


def write_single(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")


def write_shards(folder: Path, tensors: Tensors) -> None:
    """Every other tensor in the second file."""
    keys = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def read_expert(folder: Path, expert: int, shape: ExpertShape = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up, down = torch.zeros(shape.gate_up), torch.zeros(shape.down)
    with CheckpointFolder(folder) as files:
        ExpertReader(files, 1, shape).read(expert, gate_up, down)
    return gate_up, down


@pytest.mark.parametrize("write", [write_single, write_shards])
@pytest.mark.parametrize("tensors", [hub_tensors(), fused_tensors()], ids=["hub", "fused"])
def test_every_layout_gives_the_same_expert(
    tmp_path: Path, write: Callable[[Path, Tensors], None], tensors: Tensors
) -> None:
    write(tmp_path, tensors)
    gate_up, down = read_expert(tmp_path, 2)
    expected, prefix = hub_tensors(), "model.layers.1.mlp.experts.2"
    gate, up = expected[f"{prefix}.gate_proj.weight"], expected[f"{prefix}.up_proj.weight"]
    torch.testing.assert_close(gate_up, torch.cat((gate, up)).float(), rtol=0, atol=0)
    torch.testing.assert_close(down, expected[f"{prefix}.down_proj.weight"].float(), rtol=0, atol=0)


def test_only_the_experts_asked_for_are_read(tmp_path: Path) -> None:
    write_shards(tmp_path, hub_tensors())
    wanted = "model.layers.1.mlp.experts.0"
    kept = {key for key in hub_tensors() if key.startswith(wanted)}
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for key in weight_map:
        weight_map[key] = "kept.safetensors" if key in kept else "not-there.safetensors"
    save_file({key: hub_tensors()[key] for key in kept}, tmp_path / "kept.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_expert(tmp_path, 0)[0].any()
    with pytest.raises(
        CheckpointError, match=r"not-there\.safetensors: expected a readable safetensors file"
    ):
        read_expert(tmp_path, 1)


def test_a_missing_expert_is_named_whichever_rank_it_belongs_to(tmp_path: Path) -> None:
    tensors = hub_tensors()
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    write_single(tmp_path, tensors)
    with pytest.raises(
        CheckpointError, match=r"experts\.3\.up_proj\.weight: expected, for a model of 4 experts"
    ):
        read_expert(tmp_path, 0)


@pytest.mark.parametrize("tensors", [hub_tensors(), fused_tensors()], ids=["hub", "fused"])
def test_a_wrong_shape_is_named(tmp_path: Path, tensors: Tensors) -> None:
    write_single(tmp_path, tensors)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: .*gate.*: expected a tensor of shape .* found"
    ):
        read_expert(tmp_path, 0, ExpertShape(4, SHAPE.hidden_size, 7))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected a Qwen3-MoE model's configuration"),
        ("{", "expected a Qwen3-MoE model's configuration"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "model_type: expected 'qwen3_moe', found None"),
        ('{"model_type": "llama"}', "model_type: expected 'qwen3_moe', found 'llama'"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [None, "{}", '{"weight_map": 3}', "no json"])
def test_a_folder_without_usable_tensors_is_refused(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="expected"):
        CheckpointFolder(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors in here")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a readable safetensors file"):
        CheckpointFolder(tmp_path)


def test_the_shipped_checkpoint_is_a_small_byte_level_qwen3_moe() -> None:
    folder = DEMO / "checkpoint"
    config = read_config(folder)
    assert (config["vocab_size"], config["num_experts"], config["num_experts_per_tok"]) == (256, 64, 4)
    assert config["num_hidden_layers"] == 4
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 * MEBIBYTE
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_shipped_texts_are_of_several_kinds() -> None:
    texts = {path.stem: path.read_bytes() for path in (DEMO / "texts").glob("*.txt")}
    assert {"python", "prose", "c", "json", "table", "markup"} <= texts.keys()
    assert all(30_000 <= len(text) <= 60_000 for text in texts.values())
