"""Train the demo's tiny byte-level Qwen3-MoE on two CPU cores, and say how its routing is skewed.

    python examples/train_tiny_moe.py --output my-checkpoint          # trains, then prints the report
    python examples/train_tiny_moe.py --report my-checkpoint          # the report alone

The kinds of text are introduced one by one, and the loss rewards experts that specialise in a kind: as in
large models, expert load is skewed and follows what is being served. The result is a folder in the hub's
layout for Qwen3-MoE (`config.json`, `model.safetensors` in bfloat16).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import demo_texts  # type: ignore[import-not-found]  # beside this script, which is run by its path
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SEQUENCE = 128
BATCH = 30
SPECIALISATION = 0.3
"""Weight in the loss of `TinyMoe.specialisation`."""


@dataclass(frozen=True)
class Shape:
    """The model's shape, in the words of Qwen3MoeConfig."""

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 64
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 32
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6


class GroupedLinear(torch.autograd.Function):
    """Rows by expert, each times its expert's matrix: [rows, in], [experts, out, in] to [rows, out]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends
        output = rows.new_empty(len(rows), weight.shape[1])
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                torch.mm(rows[start:end], weight[expert].t(), out=output[start:end])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        rows_gradient, weight_gradient = torch.empty_like(rows), torch.zeros_like(weight)
        for expert, (start, end) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
            if end > start:
                torch.mm(gradient[start:end], weight[expert], out=rows_gradient[start:end])
                torch.mm(gradient[start:end].t(), rows[start:end], out=weight_gradient[expert])
        return rows_gradient, weight_gradient, None


class SortByExpert(torch.autograd.Function):
    """Tokens -> one row per choice, sorted by expert; the gradient is a gather and a sum."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = len(order) // len(tokens)
        return tokens.index_select(0, order // ctx.top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        rows = gradients[0].index_select(0, *ctx.saved_tensors)
        return rows.view(-1, ctx.top_k, rows.shape[1]).sum(1), None, None


class Permute(torch.autograd.Function):
    """Rows in another order; the gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, *ctx.saved_tensors), None, None


class SparseMoe(nn.Module):
    """Qwen3-MoE's block: softmax, top-k, renormalised; SwiGLU experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        experts, inner, hidden = shape.num_experts, shape.moe_intermediate_size, shape.hidden_size
        self.top_k = shape.num_experts_per_tok
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.down = nn.Parameter(
            torch.randn(experts, hidden, inner) * (inner * 2 * shape.num_hidden_layers) ** -0.5
        )
        self.load = torch.zeros(experts, dtype=torch.int64)
        """Tokens routed to each expert in the last forward."""
        self.probabilities = torch.zeros(0, experts)
        """The router's mean probabilities for each sequence of the last forward: [sequences, experts]."""

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        probabilities = self.gate(tokens).softmax(-1)
        self.probabilities = probabilities.view(*hidden.shape[:2], -1).mean(1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort()
        inverse = order.argsort()
        self.load = torch.bincount(experts.flatten(), minlength=len(self.gate_up))
        ends: list[int] = self.load.cumsum(0).tolist()
        rows = SortByExpert.apply(tokens, order, inverse)  # type: ignore[no-untyped-call]
        inner: Tensor = GroupedLinear.apply(rows, self.gate_up, ends)  # type: ignore[no-untyped-call]
        gate, up = inner.chunk(2, dim=-1)
        outputs = GroupedLinear.apply(F.silu(gate) * up, self.down, ends)  # type: ignore[no-untyped-call]
        outputs = Permute.apply(outputs, inverse, order)  # type: ignore[no-untyped-call]
        return torch.bmm(weights[:, None], outputs.view(*weights.shape, -1)).view_as(hidden)


class Attention(nn.Module):
    """Qwen3's attention: grouped queries, normalised queries and keys, rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * shape.head_dim, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        query = self.q_norm(self.q_proj(hidden).view(batch, length, self.heads, -1)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(batch, length, self.kv_heads, -1)).transpose(1, 2)
        value = self.v_proj(hidden).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        query, key = (x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * sin
                      for x in (query, key))  # fmt: skip
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = SparseMoe(shape)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        update: Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + update


class TinyMoe(nn.Module):
    """A Qwen3-MoE in plain torch, for training: no key-value cache, no padding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        for block in self._blocks():
            # Decided from the start: from torch's default, a flat router, specialists are slow to emerge.
            nn.init.normal_(block.gate.weight, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        """int [batch, length] -> logits [batch, length, vocabulary]."""
        half = torch.arange(0, self.shape.head_dim, 2) / self.shape.head_dim
        angles = torch.outer(torch.arange(tokens.shape[1]), self.shape.rope_theta**-half).repeat(1, 2)
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden, angles.cos(), angles.sin())
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits

    def specialisation(self, kinds: Tensor) -> Tensor:
        """Mutual information of kind and expert in the last forward, in nats, mean over layers.

        kinds: [sequences]. High when every expert is used by some kind and few by all: each kind has its
        specialists, and no expert is given up. From Mod-Squad (Chen et al., 2023), for tasks there.
        """
        members = F.one_hot(kinds).float()
        share = members.mean(0)
        total = torch.zeros(())
        for block in self._blocks():
            of_kind = members.t() @ block.probabilities / members.sum(0).clamp(min=1)[:, None]
            total = total + _entropy(share @ of_kind) - share @ _entropy(of_kind)
        return total / len(self.layers)

    def load(self) -> Tensor:
        """Tokens routed to each expert in the last forward: [layers, experts]."""
        return torch.stack([block.load for block in self._blocks()])

    def _blocks(self) -> list[SparseMoe]:
        return [block for block in self.modules() if isinstance(block, SparseMoe)]


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-9).log()).sum(-1)


def curriculum(progress: float, kinds: int) -> list[float]:
    """Share of each kind at `progress` (0 to 1): from two kinds on one more at a time; then all alike."""
    opened = min(kinds, 2 + int(progress / 0.5 * (kinds - 1)))
    if progress > 0.5:
        return [1 / kinds] * kinds
    return [0.5 / (opened - 1)] * (opened - 1) + [0.5] + [0.0] * (kinds - opened)


def draw_batch(
    texts: Sequence[Tensor], shares: Sequence[float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`BATCH` pieces of `SEQUENCE` + 1 bytes, kinds drawn by `shares`; and the kinds."""
    kinds = torch.multinomial(torch.tensor(shares), BATCH, replacement=True, generator=generator)
    pieces = []
    for kind, start in zip(kinds.tolist(), torch.rand(BATCH, generator=generator).tolist(), strict=True):
        first = int(start * (len(texts[kind]) - SEQUENCE - 1))
        pieces.append(texts[kind][first : first + SEQUENCE + 1])
    return torch.stack(pieces).long(), kinds


def bytes_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def train(model: TinyMoe, texts: Sequence[Tensor], steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    began, smooth = time.monotonic(), math.nan
    for step in range(steps):
        progress = step / steps
        rate = (
            3e-3 * min(1.0, (step + 1) / 60) * (1.0 if progress < 0.5 else 0.02 + 0.98 * (2 - 2 * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch, kinds = draw_batch(texts, curriculum(progress, len(texts)), generator)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        specialisation = model.specialisation(kinds)
        (loss - SPECIALISATION * specialisation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49 or step + 1 == steps:
            seconds = time.monotonic() - began
            losses = f"loss {smooth:.3f} nats/byte  specialisation {specialisation.item():.2f} nats"
            print(f"step {step + 1:5}/{steps}  {losses}  {seconds:5.0f} s", flush=True)


def to_hub(model: TinyMoe) -> dict[str, Tensor]:
    """The weights under the hub's names, one tensor per expert and projection."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith(("mlp.gate_up", "mlp.down")):
            prefix = f"model.{name.rpartition('.')[0]}.experts"
            for expert, matrix in enumerate(value):
                if name.endswith("down"):
                    tensors[f"{prefix}.{expert}.down_proj.weight"] = matrix
                else:
                    gate, up = matrix.chunk(2)
                    tensors |= {
                        f"{prefix}.{expert}.gate_proj.weight": gate,
                        f"{prefix}.{expert}.up_proj.weight": up,
                    }
        else:
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = value
    return {name: value.to(torch.bfloat16).contiguous().clone() for name, value in tensors.items()}


def from_hub(tensors: Mapping[str, Tensor], shape: Shape) -> TinyMoe:
    model = TinyMoe(shape)
    state = {
        name.removeprefix("model."): value.float()
        for name, value in tensors.items()
        if ".experts." not in name
    }
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack(
                [tensors[f"{prefix}.{e}.{part}_proj.weight"].float() for e in range(shape.num_experts)]
            )
            for part in ("gate", "up", "down")
        }
        state[f"layers.{layer}.mlp.gate_up"] = torch.cat((parts["gate"], parts["up"]), 1)
        state[f"layers.{layer}.mlp.down"] = parts["down"]
    model.load_state_dict(state)
    return model


def save(model: TinyMoe, folder: Path, note: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = asdict(model.shape) | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
        "intermediate_size": 4 * model.shape.hidden_size, "max_position_embeddings": 4096,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "use_sliding_window": False,
        "initializer_range": 0.02, "use_cache": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = folder / "model.safetensors"
    save_file(to_hub(model), weights, metadata={"format": "pt", **note})
    weights.chmod(0o644)


def read(folder: Path) -> TinyMoe:
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{name: config[name] for name in asdict(Shape())})
    return from_hub(load_file(folder / "model.safetensors"), shape)


@torch.no_grad()
def measure(model: TinyMoe, text: Tensor) -> tuple[float, Tensor]:
    """Loss in bits per byte on a text, and its expert load per forward: [forwards, layers, experts]."""
    pieces = text[: len(text) // (SEQUENCE + 1) * (SEQUENCE + 1)].view(-1, SEQUENCE + 1).long()
    losses, loads = [], []
    for piece in pieces.split(8):
        logits = model(piece[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten()).item())
        loads.append(model.load())
    return sum(losses) / len(losses) / math.log(2), torch.stack(loads).double()


def balancedness(load: Tensor, ranks: int) -> float:
    """Of the contiguous placement at the rank level, mean over layers and forwards: load [..., experts]."""
    rank_load = load.unflatten(-1, (ranks, -1)).sum(-1)
    return float((rank_load.mean(-1) / rank_load.amax(-1)).mean())


def correlation(one: Tensor, other: Tensor) -> float:
    """Of the expert load [layers, experts] of two kinds, mean over layers."""
    pairs = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(one, other, strict=True)]
    return sum(pairs) / len(pairs)


def report(model: TinyMoe) -> None:
    """How the routing is skewed on the held-out texts, and how much it differs between the kinds."""
    loads: dict[str, Tensor] = {}
    print(
        "Expert load, max / mean in each layer; balancedness of the contiguous placement on 2, 4 and 8 ranks:"
    )
    for kind in demo_texts.KINDS:
        bits, load = measure(model, bytes_tensor(demo_texts.held_out_text(kind)))
        loads[kind] = load.sum(0)
        print(f"{kind:8} {bits:5.2f} bits/byte  {_skew(loads[kind])}  per forward {_balance(load)}")
    mixed = torch.stack(list(loads.values())).sum(0)
    print(f"{'all':8} {'':15}  {_skew(mixed)}")
    unused = (mixed < 0.05 * mixed.mean(-1, keepdim=True)).sum(-1).tolist()
    print(f"experts below 5 % of the mean load over all kinds, per layer: {unused}")
    print("correlation of expert load between kinds, mean over layers:")
    for kind, load in loads.items():
        print(f"{kind:8} " + "  ".join(f"{correlation(load, other):5.2f}" for other in loads.values()))


def _skew(load: Tensor) -> str:
    peak = "  ".join(f"{value:4.1f}" for value in load.amax(-1) / load.mean(-1))
    return f"{peak}   {_balance(load)}"


def _balance(load: Tensor) -> str:
    return "  ".join(f"{balancedness(load, ranks):.2f}" for ranks in (2, 4, 8))


@torch.no_grad()
def continue_text(model: TinyMoe, prompt: bytes, count: int) -> bytes:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return bytes(tokens[len(prompt) :])


def print_samples(model: TinyMoe) -> None:
    for kind in demo_texts.KINDS:
        text = demo_texts.held_out_text(kind)
        prompt = text[len(text) // 2 : len(text) // 2 + 160]
        print(f"--- {kind}: {prompt[-60:].decode(errors='replace')!r}")
        print(f"      -> {continue_text(model, prompt, 100).decode(errors='replace')!r}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a tiny byte-level Qwen3-MoE whose routing follows the kind of text."
    )
    parser.add_argument("--output", type=Path, help="folder for the trained checkpoint")
    parser.add_argument("--report", type=Path, help="print the report of this checkpoint, do not train")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more hardly help a model this small")
    chosen = parser.parse_args()
    if (chosen.output is None) == (chosen.report is None):
        parser.error("give either --output (train) or --report")
    return chosen


def train_new(chosen: argparse.Namespace) -> TinyMoe:
    texts = []
    for kind in demo_texts.KINDS:
        texts.append(bytes_tensor(demo_texts.training_text(kind, chosen.seed)))
        print(f"training text {kind:7} {len(texts[-1]):10,} bytes")
    torch.manual_seed(chosen.seed)
    model = TinyMoe(Shape())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {BATCH} x {SEQUENCE} bytes a step")
    train(model, texts, chosen.steps, torch.Generator().manual_seed(chosen.seed))
    note = {"trained_with": f"examples/train_tiny_moe.py --steps {chosen.steps} --seed {chosen.seed}"}
    save(model, chosen.output, note)
    return read(chosen.output)


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    model = read(chosen.report) if chosen.report else train_new(chosen)
    report(model)
    print_samples(model)


if __name__ == "__main__":
    main()
