"""Experts on CPUs that compute only what is theirs: beside vLLM's own kernel with all experts on one rank."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("vllm")
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
    biased_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.platforms import current_platform

from eplb_platform.integrations.vllm import compatibility, cpu_experts

if not current_platform.is_cpu():
    pytest.skip("vLLM is not built for CPUs", allow_module_level=True)

EXPERTS, HIDDEN, INTERMEDIATE, CHOICES, TOKENS = 8, 64, 32, 3, 17


@dataclass
class Layer:
    """The weights of all experts, and a routing."""

    w13: torch.Tensor
    w2: torch.Tensor
    biases: tuple[torch.Tensor, torch.Tensor] | None
    hidden_states: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


def make_layer(dtype: torch.dtype = torch.float32, *, has_bias: bool = False) -> Layer:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2).to(dtype)

    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    weights, ids = logits.softmax(-1).topk(CHOICES)
    biases = (random(EXPERTS, 2 * INTERMEDIATE), random(EXPERTS, HIDDEN)) if has_bias else None
    return Layer(
        w13=random(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        w2=random(EXPERTS, HIDDEN, INTERMEDIATE),
        biases=biases,
        hidden_states=random(TOKENS, HIDDEN) * 5,
        weights=weights.contiguous(),
        ids=ids.to(torch.int32).contiguous(),
    )


def parallel_config(num_ranks: int) -> FusedMoEParallelConfig:
    is_parallel = num_ranks > 1
    return FusedMoEParallelConfig(
        tp_size=1, pcp_size=1, dp_size=1, ep_size=num_ranks, tp_rank=0, pcp_rank=0, dp_rank=0, ep_rank=0,
        sp_size=1, use_ep=is_parallel, all2all_backend="allgather_reducescatter", enable_eplb=is_parallel,
    )  # fmt: skip


def compute(
    layer: Layer,
    experts_class: type,
    num_ranks: int,
    rank: int,
    slots: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The part of `rank`, through vLLM's class. slots: [physical], logical experts; all once if None."""
    slots = torch.arange(EXPERTS) if slots is None else slots
    num_local, expert_map, _ = determine_expert_map(num_ranks, rank, len(slots))
    own = slots if expert_map is None else slots[expert_map >= 0]
    assert len(own) == num_local
    config = FusedMoEConfig(
        num_experts=len(slots),
        experts_per_token=CHOICES,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=num_local,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel_config(num_ranks),
        in_dtype=layer.w13.dtype,
    )
    module = torch.nn.Module()
    module.activation = MoEActivation.SILU
    for name, weight in (("w13_weight", layer.w13), ("w2_weight", layer.w2)):
        module.register_parameter(name, torch.nn.Parameter(weight[own].contiguous(), requires_grad=False))
    quant = FusedMoEQuantConfig.make()
    if layer.biases is not None:
        for name, bias in zip(("w13_bias", "w2_bias"), layer.biases, strict=True):
            module.register_parameter(name, torch.nn.Parameter(bias[own].contiguous(), requires_grad=False))
        quant = biased_moe_quant_config(module.w13_bias, module.w2_bias)
    experts = experts_class(config, quant)
    experts.process_weights_after_loading(module)
    output = torch.full_like(layer.hidden_states, float("nan"))
    empty = torch.empty(0)
    experts.apply(
        output=output, hidden_states=layer.hidden_states, w1=module.w13_weight, w2=module.w2_weight,
        topk_weights=layer.weights, topk_ids=layer.ids if ids is None else ids, activation=MoEActivation.SILU,
        global_num_experts=len(slots), expert_map=expert_map, a1q_scale=None, a2_scale=None,
        workspace13=empty, workspace2=empty, expert_tokens_meta=None, apply_router_weight_on_input=False,
    )  # fmt: skip
    return output


@pytest.fixture(autouse=True)
def equipped() -> object:
    cpu_experts.install()
    with set_current_vllm_config(VllmConfig()):
        yield


def by_hand(layer: Layer, ids: torch.Tensor) -> torch.Tensor:
    """The layer in plain torch, in float64; an id of -1 adds nothing."""
    output = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for row in range(TOKENS):
        for choice in range(CHOICES):
            expert = int(ids[row, choice])
            if expert < 0:
                continue
            state = layer.hidden_states[row].double()
            bias_13, bias_2 = (
                (0.0, 0.0) if layer.biases is None else (b[expert].double() for b in layer.biases)
            )
            gate, up = (layer.w13[expert].double() @ state + bias_13).chunk(2)
            part = layer.w2[expert].double() @ (torch.nn.functional.silu(gate) * up) + bias_2
            output[row] += float(layer.weights[row, choice]) * part
    return output


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_ranks_parts_add_up_to_vllms_own_result(num_ranks: int, has_bias: bool) -> None:
    layer = make_layer(has_bias=has_bias)
    whole = compute(layer, cpu_moe.CPUUnquantizedExperts, 1, 0)
    torch.testing.assert_close(whole.double(), by_hand(layer, layer.ids), rtol=1e-5, atol=1e-5)
    parts = [compute(layer, cpu_moe.CPUUnquantizedExperts, num_ranks, rank) for rank in range(num_ranks)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=0, atol=1e-6)


def test_a_choice_gives_exactly_what_vllm_gives_for_it_alone() -> None:
    layer = make_layer()
    rank, num_ranks = 1, 2
    part = compute(layer, cpu_moe.CPUUnquantizedExperts, num_ranks, rank)
    expected = torch.zeros_like(part)
    for choice in range(CHOICES):
        one = Layer(
            layer.w13, layer.w2, None, layer.hidden_states,
            layer.weights[:, [choice]].contiguous(), layer.ids[:, [choice]].contiguous(),
        )  # fmt: skip
        alone = compute(one, cpu_moe.CPUUnquantizedExperts, 1, 0)
        is_local = layer.ids[:, choice] >= EXPERTS // num_ranks
        expected[is_local] += alone[is_local]
    assert torch.equal(part, expected)


def test_tokens_of_other_ranks_add_exactly_nothing() -> None:
    layer = make_layer()
    layer.ids = torch.full_like(layer.ids, EXPERTS - 1)
    layer.hidden_states[3] = float("inf")
    assert torch.equal(compute(layer, cpu_moe.CPUUnquantizedExperts, 2, 0), torch.zeros(TOKENS, HIDDEN))


def test_a_choice_of_none_adds_nothing() -> None:
    layer = make_layer()
    ids = layer.ids.clone()
    ids[2:5, 1] = -1
    ids[-2:] = -1
    parts = [compute(layer, cpu_moe.CPUUnquantizedExperts, 2, rank, ids=ids) for rank in (0, 1)]
    torch.testing.assert_close(sum(parts).double(), by_hand(layer, ids), rtol=1e-5, atol=1e-5)
    assert not sum(parts)[-2:].any()


def test_replicas_in_any_places_give_the_same_sum() -> None:
    layer = make_layer()
    whole = compute(layer, cpu_moe.CPUUnquantizedExperts, 1, 0)
    slots = torch.tensor([3, 0, 5, 1, 2, 7, 4, 6, 3, 0])  # experts 0 and 3 twice
    generator = torch.Generator().manual_seed(1)
    ids = layer.ids.clone()
    for row in range(TOKENS):
        for choice in range(CHOICES):
            places = (slots == layer.ids[row, choice]).nonzero()[:, 0]
            ids[row, choice] = places[torch.randint(len(places), (1,), generator=generator)]
    parts = [compute(layer, cpu_moe.CPUUnquantizedExperts, 2, r, slots=slots, ids=ids) for r in (0, 1)]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-6)


def test_bfloat16_is_summed_in_float32() -> None:
    layer = make_layer(torch.bfloat16)
    parts = [compute(layer, cpu_moe.CPUUnquantizedExperts, 2, rank).double() for rank in (0, 1)]
    torch.testing.assert_close(parts[0] + parts[1], by_hand(layer, layer.ids), rtol=2e-2, atol=2e-2)
    output = torch.empty(1, 1, dtype=torch.bfloat16)
    ones = torch.ones(512, 1, dtype=torch.bfloat16)
    cpu_experts.sum_pairs(ones, torch.zeros(512, dtype=torch.int64), output)
    assert output.item() == 512  # added up in bfloat16 it would be 256


def test_the_kernel_computes_local_pairs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    kernel = cpu_moe.cpu_fused_moe

    def counting(output: torch.Tensor, *args: object) -> None:
        computed.append(tuple(output.shape))
        kernel(output, *args)

    monkeypatch.setattr(cpu_moe, "cpu_fused_moe", counting)
    layer = make_layer()
    for rank in (0, 1):
        compute(layer, cpu_moe.CPUUnquantizedExperts, 2, rank)
    local = int((layer.ids < EXPERTS // 2).sum())
    assert computed == [(local, HIDDEN), (TOKENS * CHOICES - local, HIDDEN)]


@pytest.mark.parametrize("experts", cpu_experts.experts_classes(), ids=lambda c: c.__name__)
def test_every_class_of_vllm_gives_its_kernel_local_ids(
    experts: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for other processors cannot run here: a stand-in in their place shows what they are given."""
    apply = compatibility.original(experts.apply)
    seen = {}

    def stand_in(self: object, **arguments: object) -> None:
        seen.update(arguments)
        arguments["output"].copy_(arguments["hidden_states"] * arguments["topk_weights"])  # type: ignore[attr-defined]

    names = list(inspect.signature(apply).parameters)[1:]
    stand_in.__signature__ = inspect.signature(apply)  # type: ignore[attr-defined]
    wrapped = cpu_experts._on_local_pairs(stand_in)
    layer = make_layer()
    _, expert_map, _ = determine_expert_map(2, 1, EXPERTS)
    arguments = dict.fromkeys(names)
    output = torch.full_like(layer.hidden_states, float("nan"))
    arguments.update(
        output=output, hidden_states=layer.hidden_states, topk_weights=layer.weights, topk_ids=layer.ids,
        expert_map=expert_map,
    )  # fmt: skip
    wrapped(object(), **arguments)
    is_local = layer.ids >= EXPERTS // 2
    assert torch.equal(seen["topk_ids"][:, 0], layer.ids[is_local] - EXPERTS // 2)
    expected = layer.hidden_states * (layer.weights * is_local).sum(1, keepdim=True)
    torch.testing.assert_close(output, expected)
    assert hasattr(experts.apply, compatibility._MARK)


def test_expert_parallelism_without_a_map_is_refused() -> None:
    experts = object.__new__(cpu_moe.CPUUnquantizedExperts)
    experts.moe_config = type("Config", (), {"moe_parallel_config": parallel_config(2)})()
    with pytest.raises(RuntimeError, match="CPUUnquantizedExperts was given no expert map"):
        experts.apply(expert_map=None)


def test_a_packed_expert_moves_as_its_own_rows() -> None:
    """What the balancer relies on: packing an expert depends on that expert alone."""
    layer = make_layer()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    packed = cpu_moe.cpu_prepack_moe_weight(layer.w13, "vec")
    reordered = cpu_moe.cpu_prepack_moe_weight(layer.w13[order].contiguous(), "vec")
    assert torch.equal(reordered, packed[order])
    assert not torch.equal(reordered, packed)
