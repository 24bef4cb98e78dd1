"""What vLLM's quantised layers keep for each expert moves, or no balancer starts.

The layers are made as vLLM makes them, but for the choice of a kernel, which needs the device.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from compressed_tensors.quantization import QuantizationStrategy
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.trtllm_fp8_moe import (
    TrtLlmFp8ExpertsBase,
    TrtLlmFp8ExpertsMonolithic,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization import fp8 as vllm_fp8
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4,
    compressed_tensors_moe_w8a8_fp8,
    compressed_tensors_moe_w8a8_int8,
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8MoEMethod, ModelOptNvFp4FusedMoE
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4MoEMethod

from eplb_platform.integrations.vllm.layer_tensors import LayerTensors, tensors_of
from tests.vllm.test_quantised_layers import BLOCK, HIDDEN, INNER, SHARED, SLOTS

GLOBAL = 2 * SLOTS
PER_CHANNEL = SimpleNamespace(strategy=QuantizationStrategy.CHANNEL, dynamic=True)
PER_TENSOR = SimpleNamespace(strategy=QuantizationStrategy.TENSOR, dynamic=False)


def layer_of(
    method_class: type[FusedMoEMethodBase], *, prepared: bool = False, **attributes: Any
) -> RoutedExperts:
    """A layer with the parameters that vLLM's method gives it, and with what its kernel would be told."""
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.local_num_experts, layer.global_num_experts = SLOTS, GLOBAL
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, INNER
    method: Any = method_class.__new__(method_class)
    moe = SimpleNamespace(is_act_and_mul=True, w13_num_shards=2, has_bias=True)
    moe.intermediate_size_per_partition_unpadded, moe.hidden_dim_unpadded = INNER, HIDDEN
    if isinstance(method, torch.nn.Module):
        torch.nn.Module.__init__(method)
    vars(method).update({"moe": moe, "moe_quant_config": None, "moe_kernel": None} | attributes)
    with mock.patch.object(parallel_state, "_TP", SimpleNamespace(world_size=1, rank_in_group=0)):
        method.create_weights(
            layer,
            num_experts=SLOTS,
            hidden_size=HIDDEN,
            intermediate_size_per_partition=INNER,
            params_dtype=torch.bfloat16,
            weight_loader=None,
            global_num_experts=GLOBAL,
        )
    for name, parameter in layer.named_parameters():
        fill_by_slot(parameter.data, equal=name in SHARED)
    layer.quant_method = method
    if prepared:
        prepare(layer)
    else:
        method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    return layer


def prepare(layer: RoutedExperts) -> None:
    """As vLLM does after loading, but for the kernel, which keeps nothing of its own here."""

    def make_kernel(*, moe_quant_config: FusedMoEQuantConfig, **arguments: object) -> SimpleNamespace:
        experts = SimpleNamespace(quant_config=moe_quant_config)
        experts.process_weights_after_loading = lambda layer: None
        return SimpleNamespace(fused_experts=experts)

    layer.moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(enable_eplb=False))
    layer.quant_method.experts_cls = object
    with (
        mock.patch.object(vllm_fp8, "make_fp8_moe_kernel", make_kernel),
        mock.patch.object(compressed_tensors_moe_w4a4_nvfp4, "make_nvfp4_moe_kernel", make_kernel),
    ):
        layer.quant_method.process_weights_after_loading(layer)


def fill_by_slot(tensor: torch.Tensor, *, equal: bool) -> None:
    for slot in range(len(tensor) if tensor.dim() else 0):
        tensor[slot] = torch.full(tensor[slot].shape, 1 if equal else slot + 1).to(tensor.dtype)


def fp8(block: int | None, *, prepared: bool = False) -> RoutedExperts:
    return layer_of(
        Fp8MoEMethod,
        prepared=prepared,
        quant_config=SimpleNamespace(
            activation_scheme="dynamic" if block else "static", is_checkpoint_fp8_serialized=True
        ),
        block_quant=block is not None,
        weight_block_size=None if block is None else [block, block],
        moe_block_shape=None if block is None else [block, block],
        weight_scale_refine=None,
        weight_scale_name="weight_scale" if block is None else "weight_scale_inv",
        fp8_backend=Fp8MoeBackend.TRITON,
    )


def fp8_of_compressed_tensors(quantised: SimpleNamespace) -> RoutedExperts:
    return layer_of(
        compressed_tensors_moe_w8a8_fp8.CompressedTensorsW8A8Fp8MoEMethod,
        weight_quant=quantised,
        input_quant=quantised,
        block_quant=False,
        weight_block_size=None,
        static_input_scales=not quantised.dynamic,
        fp8_backend=Fp8MoeBackend.TRITON,
    )


def int8() -> RoutedExperts:
    return layer_of(
        compressed_tensors_moe_w8a8_int8.CompressedTensorsW8A8Int8MoEMethod,
        weight_quant=PER_CHANNEL,
        input_quant=PER_CHANNEL,
        static_input_scales=False,
        int8_backend=Int8MoeBackend.TRITON,
    )


def int4() -> RoutedExperts:
    return layer_of(
        compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod,
        strategy="group",
        group_size=32,
        symmetric=False,
        packed_factor=8,
        num_bits=4,
        wna16_backend=WNA16MoEBackend.TRITON,
    )


def gptq() -> RoutedExperts:
    quant_config = SimpleNamespace(
        quant_type=SimpleNamespace(size_bits=4),
        group_size=32,
        pack_factor=8,
        is_sym=False,
        weight_bits=4,
        desc_act=False,
    )
    return layer_of(
        AutoGPTQMoEMethod,
        input_dtype=None,
        wna16_moe_backend=WNA16MoEBackend.MARLIN,
        quant_config=quant_config,
    )


def awq() -> RoutedExperts:
    return layer_of(
        AutoAWQMoEMethod,
        input_dtype=None,
        wna16_moe_backend=WNA16MoEBackend.MARLIN,
        quant_config=SimpleNamespace(pack_factor=8, group_size=32, weight_bits=4, zero_point=True),
    )


def nvfp4_of_compressed_tensors() -> RoutedExperts:
    return layer_of(
        compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod,
        prepared=True,
        group_size=16,
        use_a16=False,
        use_global_sf=False,
        nvfp4_backend=NvFp4MoeBackend.EMULATION,
    )


def fp8_of_modelopt() -> RoutedExperts:
    return layer_of(
        ModelOptFp8MoEMethod,
        quant_config=SimpleNamespace(is_checkpoint_fp8_serialized=True),
        fp8_backend=Fp8MoeBackend.TRITON,
    )


def nvfp4() -> RoutedExperts:
    return layer_of(
        ModelOptNvFp4FusedMoE,
        quant_config=SimpleNamespace(is_checkpoint_nvfp4_serialized=True, group_size=16),
        use_global_sf=False,
        use_a16=False,
        nvfp4_backend=NvFp4MoeBackend.FLASHINFER_TRTLLM,
    )


LAYERS: dict[str, tuple[Callable[[], RoutedExperts], str]] = {
    "unquantised": (lambda: layer_of(UnquantizedFusedMoEMethod), "w13_bias"),
    "fp8 per tensor": (lambda: fp8(None), "w13_weight_scale"),
    "fp8 per block": (lambda: fp8(BLOCK), "w2_weight_scale_inv"),
    "fp8 per block, prepared": (lambda: fp8(BLOCK, prepared=True), "w13_weight_scale_inv"),
    "fp8 of modelopt": (fp8_of_modelopt, "w13_weight_scale"),
    "fp8 of compressed-tensors": (lambda: fp8_of_compressed_tensors(PER_TENSOR), "w2_weight_scale"),
    "fp8 per channel": (lambda: fp8_of_compressed_tensors(PER_CHANNEL), "w2_weight_scale"),
    "int8": (int8, "w13_weight_scale"),
    "int4": (int4, "w13_weight_zero_point"),
    "awq": (awq, "w13_qzeros"),
    "gptq": (gptq, "w2_qzeros"),
    "mxfp4": (
        lambda: layer_of(Mxfp4MoEMethod, mxfp4_backend=Mxfp4MoeBackend.MARLIN),
        "w13_weight_scale",
    ),
    "nvfp4": (nvfp4, "w2_weight_scale_2"),
    "nvfp4, prepared": (nvfp4_of_compressed_tensors, "w13_weight_scale_2"),
}


def found_in(layer: RoutedExperts) -> LayerTensors:
    return tensors_of(layer, list(layer.get_expert_weights()), SLOTS)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_layer_that_vllm_makes_is_refused_or_doubted(kind: str) -> None:
    build, _ = LAYERS[kind]
    layer = build()
    found = found_in(layer)
    assert set(found.moved) == {name for name, _ in layer.named_parameters()} - SHARED
    assert (list(found.left), list(found.doubtful)) == ([], [])


@pytest.mark.parametrize("kind", LAYERS)
def test_a_tensor_that_became_a_copy_is_left_behind(kind: str) -> None:
    """As when a kernel wants scales in another type."""
    build, name = LAYERS[kind]
    layer = build()
    copy = vars(layer)["_parameters"].pop(name).detach().clone()
    setattr(layer, name, copy)
    assert name in found_in(layer).left


@pytest.mark.parametrize("part", ["scale", "bias"])
def test_what_a_kernel_is_told_of_the_weights_is_looked_at(part: str) -> None:
    layer = int8()
    config = layer.quant_method.moe_quant_config
    assert isinstance(config, FusedMoEQuantConfig)
    setattr(config._w2, part, getattr(config._w2, part).float() * 2)
    assert list(found_in(layer).left) == [f"moe_quant_config._w2.{part}"]


def test_scales_that_a_kernel_of_vllm_multiplies_in_advance_are_left_behind() -> None:
    """TensorRT-LLM's FP8 kernel with one scale for a tensor."""
    layer = fp8(None)
    config = layer.quant_method.moe_quant_config
    config._a1.scale, config._a2.scale = torch.tensor(0.5), torch.tensor(0.25)
    with mock.patch.object(TrtLlmFp8ExpertsBase, "__init__", lambda self, moe_config, quant_config: None):
        experts = TrtLlmFp8ExpertsMonolithic.__new__(TrtLlmFp8ExpertsMonolithic)
        experts.quant_config = config
        experts.__init__(SimpleNamespace(is_act_and_mul=True), config)  # type: ignore[misc]
    layer.quant_method.moe_kernel = SimpleNamespace(fused_experts=experts)
    assert set(found_in(layer).left) == {
        f"fused_experts.{name}" for name in ("_g1_alphas", "_g2_alphas", "_g1_scale_c")
    }
