"""All that belongs to an expert moves with it, or no balancer starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest
import torch

from eplb_backends.cpu import CpuBackend
from eplb_platform.config import EplbConfig
from eplb_platform.expert_map import ExpertMap
from eplb_platform.integrations.vllm.layer_tensors import tensors_of
from eplb_platform.integrations.vllm.served_model import VllmModel
from eplb_platform.runtime.moved_together import check_moved_together
from eplb_platform.topology import Topology

SLOTS, HIDDEN, INNER, LAYERS = 4, 48, 24, 2


class Named:
    """Two layers of weights with scales; `left` is not moved."""

    expert_map = ExpertMap.initial(LAYERS, 2 * SLOTS, Topology(2))

    def __init__(self, left: str | None = None) -> None:
        self._layers = [
            {
                "weight": torch.randn(SLOTS, 3, 5),
                "scales": [torch.randn(3) for _ in range(SLOTS)],
                "router": torch.randn(2 * SLOTS, 5),
            }
            for _ in range(LAYERS)
        ]
        self.expert_weights = [
            [layer[name] for name in ("weight", "scales") if name != left] for layer in self._layers
        ]

    def layer_tensors(self, layer: int) -> Mapping[str, torch.Tensor | Sequence[torch.Tensor]]:
        return self._layers[layer]

    def apply_map(self, layers: Sequence[int], expert_map: ExpertMap) -> None: ...


def test_weights_with_their_scales_may_move_on_any_device() -> None:
    check_moved_together(Named(), CpuBackend())


@pytest.mark.parametrize(("left", "other"), [("scales", "weight"), ("weight", "scales")])
def test_nothing_of_an_expert_stays_on_any_device(left: str, other: str) -> None:
    with pytest.raises(ValueError, match=f"^layer 0: {left} would stay where they are while {other} move: "):
        check_moved_together(Named(left), CpuBackend())


@pytest.mark.parametrize("error", [AttributeError("gone"), ValueError("no shape"), TypeError("no length")])
def test_a_layer_that_cannot_be_looked_at_is_told_of_and_served(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(Named):
        def layer_tensors(self, layer: int) -> Mapping[str, torch.Tensor | Sequence[torch.Tensor]]:
            raise error

    check_moved_together(Odd(), CpuBackend())
    (line,) = caplog.messages
    assert line.startswith(f"layer 0: {type(error).__name__}: {error} (and so on, 2 layers): not known ")


def test_what_one_layer_hides_does_not_cover_what_another_leaves() -> None:
    class Odd(Named):
        def layer_tensors(self, layer: int) -> Mapping[str, torch.Tensor | Sequence[torch.Tensor]]:
            if layer == 0:
                raise AttributeError("gone")
            return super().layer_tensors(layer)

    with pytest.raises(ValueError, match=r"^layer 1: scales would stay"):
        check_moved_together(Odd("scales"), CpuBackend())


def test_the_refusal_names_the_key_that_makes_it_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"eplb_config\.check_expert_tensors false") as refused:
        check_moved_together(Named("scales"), CpuBackend())
    assert EplbConfig(check_expert_tensors=False).check_expert_tensors is False
    check_moved_together(Named("scales"), CpuBackend(), refuse=False)
    (line,) = caplog.messages
    assert line.startswith(str(refused.value).partition(" (eplb_config")[0])


def test_one_name_may_stand_for_two_parameters_of_the_same_memory() -> None:
    model = Named()
    for parameters in model.expert_weights:
        weight = parameters[0]
        assert isinstance(weight, torch.Tensor)
        parameters.append(weight.view(SLOTS, -1))
    check_moved_together(model, CpuBackend())


# --- a layer of vLLM's ---


class Layer(torch.nn.Module):
    """The attributes of vLLM's `RoutedExperts` that count here."""

    def __init__(self, slots: int = SLOTS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.hidden_size, self.intermediate_size_per_partition = hidden, INNER
        self.global_num_experts = 2 * slots
        self.w13_weight = torch.nn.Parameter(torch.randn(slots, 2 * INNER, hidden))
        self.w2_weight = torch.nn.Parameter(torch.randn(slots, hidden, INNER))
        self.quant_method = SimpleNamespace(moe_quant_config=None, moe_kernel=None)

    def get_expert_weights(self) -> list[torch.Tensor]:
        return [weight.view(len(weight), -1) for weight in (self.w13_weight, self.w2_weight)]


def names(layer: Layer) -> tuple[list[str], list[str]]:
    """Of the tensors that are left behind, and of the doubtful ones."""
    found = tensors_of(layer, layer.get_expert_weights(), len(layer.w13_weight))
    assert list(found.moved) == ["w13_weight", "w2_weight"]
    return list(found.left), list(found.doubtful)


def test_what_is_not_an_experts_is_left_out() -> None:
    layer = Layer()
    layer.register_buffer("_expert_map", torch.arange(SLOTS))
    layer.register_buffer("expert_local_to_global", torch.arange(SLOTS))
    layer.e_score_correction_bias = torch.randn(SLOTS)
    layer.w13_input_scale = torch.nn.Parameter(torch.rand(SLOTS))
    layer.w2_alpha = torch.tensor(3.0)
    layer.w2_shared_scale = torch.rand(1).expand(SLOTS)
    layer.tokens = torch.arange(SLOTS)
    layer.same_for_all = torch.ones(SLOTS, 3)
    layer.w13_weight_packed = layer.w13_weight.detach().transpose(1, 2)
    layer.w2_low = layer.w2_weight.detach()[:, : HIDDEN // 2]
    assert names(layer) == ([], [])


@pytest.mark.parametrize("name", ["w13_weight_scale", "extra_scale", "zero_points", "_w2_bias_bf16"])
def test_a_scale_that_is_not_moved_is_left_behind(name: str) -> None:
    """However the layer keeps it, and whatever its values."""
    as_buffer, as_attribute, as_list = Layer(), Layer(), Layer()
    as_buffer.register_buffer(name, torch.ones(SLOTS, 7))
    setattr(as_attribute, name, torch.ones(SLOTS))
    setattr(as_list, name, [torch.ones(7) for _ in range(SLOTS)])
    for layer in (as_buffer, as_attribute, as_list):
        assert names(layer) == ([name], [])


def test_weights_in_an_object_of_a_kernel_are_left_behind() -> None:
    """As Triton's MXFP4 kernels keep them, with their scales in a configuration of their own."""
    layer = Layer()
    wrapped = SimpleNamespace(storage=SimpleNamespace(data=torch.zeros(SLOTS, 8, 8)), dtype="fp4")
    precision = SimpleNamespace(weight_scale=SimpleNamespace(data=torch.zeros(SLOTS, 8)))
    layer.w13_packed = wrapped
    layer.quant_method.w13_precision_config = precision
    layer.quant_method.moe_quant_config = SimpleNamespace(_w1=SimpleNamespace(scale=precision))
    left, doubtful = names(layer)
    assert sorted(left) == ["moe_quant_config._w1.scale.weight_scale.data", "w13_packed.storage.data"]
    assert doubtful == []


def test_what_a_kernel_makes_of_scales_is_left_behind() -> None:
    layer = Layer()
    experts = SimpleNamespace(_g1_alphas=torch.rand(SLOTS), strides=torch.arange(SLOTS), quant_config=None)
    layer.quant_method.moe_kernel = SimpleNamespace(fused_experts=experts)
    layer.quant_method = SimpleNamespace(old_quant_method=layer.quant_method)
    assert names(layer) == (["fused_experts._g1_alphas"], [])


def test_values_that_differ_between_slots_are_doubtful() -> None:
    layer = Layer()
    layer.register_buffer("unknown", torch.rand(SLOTS, 3))
    scales = torch.rand(SLOTS)
    layer.quant_method.moe_quant_config = SimpleNamespace(_a1=SimpleNamespace(scale=scales, dtype="nvfp4"))
    assert names(layer) == ([], ["unknown", "moe_quant_config._a1.scale"])


@pytest.mark.parametrize("slots", [HIDDEN, 2 * INNER, INNER])
def test_a_length_that_is_also_a_weights_is_no_reason_to_refuse(slots: int) -> None:
    layer = Layer(slots=slots)
    layer.norm_weight = torch.rand(slots)
    assert names(layer) == ([], [])
    layer.w2_bias_copy = torch.rand(slots)
    assert names(layer) == ([], ["w2_bias_copy"])


def test_one_slot_for_each_rank() -> None:
    layer = Layer(slots=1)
    layer.scale = torch.ones(1)
    assert names(layer) == ([], [])
    layer.w13_weight_scale = torch.ones(1, 5)
    assert names(layer) == (["w13_weight_scale"], [])


def vllm_model(layers: Sequence[Layer]) -> VllmModel:
    state = SimpleNamespace(
        model_name="tiny",
        model=SimpleNamespace(
            num_logical_experts=2 * SLOTS,
            expert_weights=[layer.get_expert_weights() for layer in layers],
            moe_layers=[SimpleNamespace(routed_experts=layer) for layer in layers],
        ),
        physical_to_logical_map=torch.arange(2 * SLOTS).expand(len(layers), -1),
    )
    return VllmModel(state, Topology(2), num_experts_per_token=2)  # type: ignore[arg-type]


def test_a_model_of_vllm_is_refused_where_a_scale_would_stay(caplog: pytest.LogCaptureFixture) -> None:
    layers = [Layer(), Layer(), Layer()]
    model = vllm_model(layers)
    check_moved_together(model, CpuBackend())
    model.warn_of_doubtful_tensors()
    assert caplog.messages == []
    layers[1].register_buffer("w13_weight_scale", torch.rand(SLOTS, 1))
    with pytest.raises(
        ValueError, match=r"^layer 1: w13_weight_scale would stay .* w13_weight, w2_weight move"
    ):
        check_moved_together(model, CpuBackend())


def test_doubtful_tensors_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    layers = [Layer(), Layer()]
    for layer in layers:
        layer.unknown = torch.rand(SLOTS, 3)
    layers[1].other = torch.rand(SLOTS)
    vllm_model(layers).warn_of_doubtful_tensors()
    [message] = caplog.messages
    assert message.startswith("tiny: unknown [4, 3] in 2 layers; other [4] in 1 layers: not moved with")


def test_tensors_without_memory_are_not_looked_into() -> None:
    layer = Layer()
    layer.w13_planned = torch.empty(SLOTS, 3, device="meta")
    layer.cache = torch.eye(SLOTS).to_sparse()
    assert names(layer) == ([], [])


def test_values_of_four_bits_are_compared() -> None:
    layer = Layer()
    layer.same = torch.zeros(SLOTS, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    layer.table = torch.arange(8 * SLOTS, dtype=torch.uint8).view(SLOTS, 8).view(torch.float4_e2m1fn_x2)
    assert names(layer) == ([], ["table"])


def test_objects_without_a_dict_hold_nothing() -> None:
    class Bare:
        __slots__ = ("moe_kernel", "moe_quant_config")

        def __init__(self) -> None:
            self.moe_quant_config, self.moe_kernel = None, None

    layer = Layer()
    layer.quant_method = Bare()
    assert names(layer) == ([], [])
