"""A Qwen3-MoE on several ranks says what it says on one, whatever the expert map."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from eplb_backends.cpu import CpuBackend
from eplb_platform.expert_map import ExpertMap
from eplb_platform.runtime.moved_together import check_moved_together
from eplb_platform.testing.processes import RankPool
from eplb_platform.topology import Topology

if TYPE_CHECKING:
    from eplb_platform.integrations.transformers import ExpertParallelModel

pytestmark = pytest.mark.processes

EXPERTS, TOP_K, LAYERS, MOE_LAYERS, RANKS = 24, 3, 4, (0, 2, 3), 4
BATCH, PROMPT, NEW_TOKENS = 3, 13, 8


def write_checkpoint(folder: Path, **changes: object) -> Path:
    """A Qwen3-MoE with random weights, one dense layer among four."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape: dict[str, object] = {
        "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "moe_intermediate_size": 24,
        "num_hidden_layers": LAYERS, "mlp_only_layers": [1],
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": True,
        "max_position_embeddings": 512, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**(shape | changes))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(RANKS, timeout_s=300) as pool:
        yield pool


def prompts(rank: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(rank).integers(0, 256, (BATCH, PROMPT)))


@dataclass
class Served:
    """What one rank answered: logits [tokens, vocabulary], greedy tokens, load [layers, physical]."""

    logits: NDArray[np.float32]
    tokens: NDArray[np.int64]
    load: NDArray[np.int64]


def greedy(module: torch.nn.Module, ids: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    logits, tokens, cache = [], [], None
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            output = module(input_ids=ids, past_key_values=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            logits.append(output.logits.flatten(0, 1))
            tokens.append(ids)
    return torch.cat(logits).numpy().copy(), torch.cat(tokens, 1).numpy().copy()


def open_model(
    rank: int, num_ranks: int, store: dist.Store, folder: Path, expert_map: ExpertMap | None, redundant: int
) -> ExpertParallelModel:
    from eplb_platform.integrations.transformers import load_expert_parallel

    torch.set_num_threads(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    return load_expert_parallel(
        folder, rank=rank, num_ranks=num_ranks, backend=CpuBackend(), expert_map=expert_map,
        num_redundant_experts=redundant,
    )  # fmt: skip


def serve(
    rank: int, num_ranks: int, store: dist.Store, folder: Path, expert_map: ExpertMap | None, redundant: int
) -> Served:
    model = open_model(rank, num_ranks, store, folder, expert_map, redundant)
    logits, tokens = greedy(model.module, prompts(rank))
    return Served(logits, tokens, model.take_load())


def random_map(seed: int, redundant: int, num_ranks: int = RANKS) -> ExpertMap:
    rng = np.random.default_rng(seed)
    layers = [
        rng.permutation(np.concatenate((np.arange(EXPERTS), rng.integers(0, EXPERTS, redundant))))
        for _ in MOE_LAYERS
    ]
    return ExpertMap(layers, EXPERTS, Topology(num_ranks))


def reference(folder: Path) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """What the plain Hugging Face model says to each rank's prompts."""
    from transformers import Qwen3MoeForCausalLM

    module = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [greedy(module.eval(), prompts(rank)) for rank in range(RANKS)]


def assert_same_answers(found: list[Served], expected: list[Served]) -> None:
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(one.logits, other.logits, err_msg=f"rank {rank}")
        np.testing.assert_array_equal(one.tokens, other.tokens, err_msg=f"rank {rank}")


def test_every_map_gives_the_same_bits(ranks: RankPool, checkpoint: Path) -> None:
    contiguous = ranks.run(serve, checkpoint, None, 0)
    assert_same_answers(ranks.run(serve, checkpoint, None, 8), contiguous)
    for seed in range(3):
        assert_same_answers(ranks.run(serve, checkpoint, random_map(seed, 8 * seed), 0), contiguous)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True},
        {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2, "hidden_act": "gelu"},
    ],
    ids=["plain", "tied-biased", "unnormalised-sparse-gelu"],
)
def test_the_answers_are_those_of_the_plain_model(
    ranks: RankPool, tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = write_checkpoint(tmp_path, **changes)
    served = ranks.run(serve, folder, None, 4)
    for found, (logits, tokens) in zip(served, reference(folder), strict=True):
        np.testing.assert_allclose(found.logits, logits, atol=1e-4)
        np.testing.assert_array_equal(found.tokens, tokens)


def test_one_rank_needs_no_group_and_says_the_same(ranks: RankPool, checkpoint: Path) -> None:
    from eplb_platform.integrations.transformers import load_expert_parallel

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = load_expert_parallel(checkpoint, rank=0, num_ranks=1, backend=CpuBackend())
        alone = [Served(*greedy(model.module, prompts(rank)), model.take_load()) for rank in range(RANKS)]
    finally:
        torch.set_num_threads(threads)
    assert_same_answers(ranks.run(serve, checkpoint, random_map(5, 12), 0), alone)


def test_every_choice_of_the_router_is_counted_once(ranks: RankPool, checkpoint: Path) -> None:
    expert_map = random_map(7, 8)
    total = np.sum([served.load for served in ranks.run(serve, checkpoint, expert_map, 0)], axis=0)
    routed = RANKS * BATCH * (PROMPT + NEW_TOKENS - 1) * TOP_K
    assert total.sum(axis=1).tolist() == [routed] * len(MOE_LAYERS)
    contiguous = np.sum([served.load for served in ranks.run(serve, checkpoint, None, 0)], axis=0)
    logical = np.zeros_like(contiguous)
    for layer, experts in enumerate(expert_map.physical_to_logical):
        np.add.at(logical[layer], experts, total[layer])
    np.testing.assert_array_equal(logical, contiguous)


def change_map(rank: int, num_ranks: int, store: dist.Store, folder: Path, move_weights: bool) -> list[bool]:
    """Serve, change to a random map with or without its weights, serve again: what stayed the same?"""
    model = open_model(rank, num_ranks, store, folder, None, 8)
    addresses = [tensor.data_ptr() for layer in model.expert_weights for tensor in layer]
    before = greedy(model.module, prompts(rank))[0]
    target = random_map(3, 8)
    if move_weights:
        donor = open_model(rank, num_ranks, store_of(store), folder, target, 0)
        for own, new in zip(model.expert_weights, donor.expert_weights, strict=True):
            for parameter, values in zip(own, new, strict=True):
                parameter.copy_(values)
    model.apply_map([1], target)
    one_layer = model.expert_map == model.expert_map.replace_layers([1], target)
    model.apply_map([0, 2], target)
    after = greedy(model.module, prompts(rank))[0]
    same_addresses = addresses == [tensor.data_ptr() for layer in model.expert_weights for tensor in layer]
    return [np.array_equal(before, after), one_layer, model.expert_map == target, same_addresses]


def store_of(store: dist.Store) -> dist.Store:
    return dist.PrefixStore("second", store)


def test_weights_and_tables_change_together_or_the_tokens_change(ranks: RankPool, checkpoint: Path) -> None:
    assert ranks.run(change_map, checkpoint, True) == [[True, True, True, True]] * RANKS
    assert ranks.run(change_map, checkpoint, False) == [[False, True, True, True]] * RANKS


def serve_with_an_idle_rank(rank: int, num_ranks: int, store: dist.Store, folder: Path) -> Served | None:
    model = open_model(rank, num_ranks, store, folder, random_map(1, 8), 0)
    if rank != 2:
        logits, tokens = greedy(model.module, prompts(rank))
        return Served(logits, tokens, model.take_load())
    for _ in range(NEW_TOKENS):
        model.dummy_step()
    assert not model.take_load().any()
    return None


def test_a_rank_without_tokens_serves_the_others(ranks: RankPool, checkpoint: Path) -> None:
    everyone = ranks.run(serve, checkpoint, None, 0)
    some = ranks.run(serve_with_an_idle_rank, checkpoint)
    assert some[2] is None
    assert_same_answers([s for s in some if s is not None], [everyone[rank] for rank in (0, 1, 3)])


def load_count(rank: int, num_ranks: int, store: dist.Store, folder: Path) -> list[int]:
    """Collective calls of one forward pass, and bytes of expert weights held."""
    model = open_model(rank, num_ranks, store, folder, None, 0)
    calls = 0
    original = dist.all_to_all_single

    def counted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return original(*args, **options)  # type: ignore[arg-type]

    dist.all_to_all_single = counted
    try:
        with torch.inference_mode():
            model.module(input_ids=prompts(rank))
    finally:
        dist.all_to_all_single = original
    return [calls, sum(tensor.nbytes for layer in model.expert_weights for tensor in layer)]


def test_a_rank_holds_its_experts_only_and_calls_three_collectives_a_layer(
    ranks: RankPool, checkpoint: Path
) -> None:
    layer_bytes = EXPERTS // RANKS * 3 * 48 * 24 * 4
    assert ranks.run(load_count, checkpoint) == [[3 * len(MOE_LAYERS), len(MOE_LAYERS) * layer_bytes]] * RANKS


def load_only(rank: int, num_ranks: int, store: dist.Store, folder: Path, expert_map: ExpertMap) -> str:
    from eplb_platform.integrations.transformers import load_expert_parallel

    try:
        load_expert_parallel(
            folder, rank=rank, num_ranks=num_ranks, backend=CpuBackend(), expert_map=expert_map
        )
    except ValueError as error:
        return str(error)
    return "loaded"


def test_a_map_that_does_not_fit_is_refused(ranks: RankPool, checkpoint: Path) -> None:
    for wrong, words in (
        (random_map(0, 0, num_ranks=2), "2 ranks; this model and group have 4"),
        (ExpertMap.initial(3, 16, Topology(4)), "16 logical experts; this model and group have 24"),
        (ExpertMap.initial(5, EXPERTS, Topology(4)), "5 MoE layers; this model and group have 3"),
    ):
        assert all(words in message for message in ranks.run(load_only, checkpoint, wrong))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", "large", "config.json: expected a Qwen3-MoE configuration"),
        ("model_type", "mixtral", "config.json: model_type: expected 'qwen3_moe', found 'mixtral'"),
        ("decoder_sparse_step", 9, "config.json: expected a layer with experts, found none"),
        (
            "hidden_size",
            64,
            "model.embed_tokens.weight: expected a tensor of shape [256, 64], found [256, 48]",
        ),
        ("num_local_experts", 25, "experts.24.gate_proj.weight: expected, for a model of 25 experts"),
        ("mlp_only_layers", [], "model.layers.1.mlp.experts.0.gate_proj.weight: expected"),
    ],
)
def test_a_folder_that_will_not_do_is_one_clear_line(
    checkpoint: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    from eplb_platform.integrations.transformers import CheckpointError, load_expert_parallel

    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert key in config
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError) as caught:
        load_expert_parallel(tmp_path, rank=0, num_ranks=1, backend=CpuBackend())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scale_that_a_layer_keeps_for_its_slots_has_to_move(checkpoint: Path) -> None:
    """With one rank the router's rows and the tables are as many as the slots, and do not count."""
    from eplb_platform.integrations.transformers import load_expert_parallel

    model = load_expert_parallel(checkpoint, rank=0, num_ranks=1, backend=CpuBackend())
    check_moved_together(model, CpuBackend())
    model.blocks[1].register_buffer("down_scale", torch.ones(EXPERTS, 1))
    with pytest.raises(
        ValueError, match=r"^layer 1: down_scale would stay where they are while gate_up, down "
    ):
        check_moved_together(model, CpuBackend())
