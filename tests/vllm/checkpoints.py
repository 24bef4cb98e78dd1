"""Small random checkpoints in the hub's layout, for vLLM to load: seeded, float32, byte vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 256
QWEN3_SPARSE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    # The only head dimensions that latent attention on a CPU takes.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "q_lora_rank": None,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "float32",
}


class _Weights:
    """Tensors by name: random, scaled so that activations keep their size and routing is decided clearly."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        weight = torch.randn(rows, columns, generator=self._generator) * gain * columns**-0.5
        self.tensors[f"{name}.weight"] = weight

    def norm(self, name: str, size: int) -> None:
        self.tensors[f"{name}.weight"] = torch.ones(size)

    def mlp(self, name: str, hidden: int, inner: int) -> None:
        self.matrix(f"{name}.gate_proj", inner, hidden, 2.0)
        self.matrix(f"{name}.up_proj", inner, hidden, 2.0)
        self.matrix(f"{name}.down_proj", hidden, inner, 2.0)

    def experts(self, name: str, config: dict[str, object], count: int) -> None:
        hidden, inner = _size(config, "hidden_size"), _size(config, "moe_intermediate_size")
        self.matrix(f"{name}.gate", count, hidden, 4.0)
        for expert in range(count):
            self.mlp(f"{name}.experts.{expert}", hidden, inner)

    def ends(self, config: dict[str, object]) -> None:
        hidden = _size(config, "hidden_size")
        self.matrix("model.embed_tokens", VOCABULARY, hidden, hidden**0.5)
        self.matrix("lm_head", VOCABULARY, hidden, 4.0)
        self.norm("model.norm", hidden)
        for layer in range(_size(config, "num_hidden_layers")):
            self.norm(f"model.layers.{layer}.input_layernorm", hidden)
            self.norm(f"model.layers.{layer}.post_attention_layernorm", hidden)


def _size(config: dict[str, object], key: str) -> int:
    value = config[key]
    if not isinstance(value, int):
        raise ValueError(f"{key}: {value!r}, expected an integer")
    return value


def write_qwen3(folder: Path, seed: int = 0) -> Path:
    """A Qwen3-MoE of other dimensions than the demo's: 64 experts, top-4 without renormalising, 4 layers."""
    config = QWEN3_SPARSE
    weights, hidden, head = _Weights(seed), _size(config, "hidden_size"), _size(config, "head_dim")
    wide = head * _size(config, "num_attention_heads")
    weights.ends(config)
    for layer in range(_size(config, "num_hidden_layers")):
        name = f"model.layers.{layer}"
        for part in "qkv":
            weights.matrix(f"{name}.self_attn.{part}_proj", wide, hidden)
        weights.matrix(f"{name}.self_attn.o_proj", hidden, wide)
        weights.norm(f"{name}.self_attn.q_norm", head)
        weights.norm(f"{name}.self_attn.k_norm", head)
        weights.experts(f"{name}.mlp", config, _size(config, "num_experts"))
    return _write(folder, config, weights)


def write_deepseek(folder: Path, seed: int = 0) -> Path:
    """A DeepSeek-V3: latent attention, dense first layer, shared experts, group-limited routing with bias."""
    config = DEEPSEEK
    weights, hidden = _Weights(seed), _size(config, "hidden_size")
    heads, rope = _size(config, "num_attention_heads"), _size(config, "qk_rope_head_dim")
    nope, value = _size(config, "qk_nope_head_dim"), _size(config, "v_head_dim")
    latent, inner = _size(config, "kv_lora_rank"), _size(config, "moe_intermediate_size")
    weights.ends(config)
    for layer in range(_size(config, "num_hidden_layers")):
        name = f"model.layers.{layer}"
        weights.matrix(f"{name}.self_attn.q_proj", heads * (nope + rope), hidden)
        weights.matrix(f"{name}.self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
        weights.norm(f"{name}.self_attn.kv_a_layernorm", latent)
        weights.matrix(f"{name}.self_attn.kv_b_proj", heads * (nope + value), latent)
        weights.matrix(f"{name}.self_attn.o_proj", hidden, heads * value)
        if layer < _size(config, "first_k_dense_replace"):
            weights.mlp(f"{name}.mlp", hidden, _size(config, "intermediate_size"))
            continue
        experts = _size(config, "n_routed_experts")
        weights.experts(f"{name}.mlp", config, experts)
        bias = torch.linspace(-0.2, 0.2, experts)
        weights.tensors[f"{name}.mlp.gate.e_score_correction_bias"] = bias
        weights.mlp(f"{name}.mlp.shared_experts", hidden, inner * _size(config, "n_shared_experts"))
    return _write(folder, config, weights)


def _write(folder: Path, config: dict[str, object], weights: _Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
