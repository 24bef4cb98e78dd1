"""Which layers of a model are mixture-of-experts layers, as far as its configuration says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

# A Hugging Face configuration has whatever its family defines, so it is an object here.
_IsMoE: TypeAlias = Callable[[object, int], bool]


def moe_layers(text_config: object) -> tuple[int, ...] | None:
    """The indices of the MoE layers among the model's layers; None for a family that is not known here.

    text_config: the Hugging Face configuration of the language model (`hf_text_config` of vLLM)

    The rules are those by which vLLM builds each family. Layers of a draft model are not counted.
    """
    rule = _RULE_OF_MODEL_TYPE.get(_text(text_config, "model_type"))
    num_layers = _whole(text_config, "num_hidden_layers", 0)
    if rule is None or num_layers < 1:
        return None
    try:
        return tuple(layer for layer in range(num_layers) if rule(text_config, layer))
    except (AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError):
        # A configuration that is not made as its family's are: the model itself will be counted.
        return None


def _every(config: object, layer: int) -> bool:
    return True


def _every_nth_but(config: object, layer: int) -> bool:
    """Qwen: one layer in `decoder_sparse_step`, except those that are named."""
    dense = _numbers(getattr(config, "mlp_only_layers", None) or ())
    return layer not in dense and (layer + 1) % _whole(config, "decoder_sparse_step", 1) == 0


def _after_first(config: object, layer: int) -> bool:
    """GLM, Bailing and others: all layers after the first dense ones."""
    return layer >= _whole(config, "first_k_dense_replace")


def _after_first_every_nth(config: object, layer: int) -> bool:
    """DeepSeek and Kimi: after the first dense layers, those whose index `moe_layer_freq` divides."""
    return _after_first(config, layer) and layer % _whole(config, "moe_layer_freq", 1) == 0


def _after_dense(config: object, layer: int) -> bool:
    return layer >= _whole(config, "num_dense_layers")


def _between(config: object, layer: int) -> bool:
    """Ernie: one layer in `moe_layer_interval`, from a first to a last one."""
    first = _whole(config, "moe_layer_start_index", 0)
    last = _whole(config, "moe_layer_end_index", _whole(config, "num_hidden_layers") - 1)
    return first <= layer <= last and (layer + 1) % _whole(config, "moe_layer_interval", 1) == 0


def _interleaved(config: object, layer: int) -> bool:
    """Llama 4: one layer in `interleave_moe_layer_step`, none if that is 0."""
    step = _whole(config, "interleave_moe_layer_step")
    return step > 0 and (layer + 1) % step == 0


def _listed(config: object, layer: int) -> bool:
    """MiMo: `moe_layer_freq` has one flag for each layer."""
    flags = getattr(config, "moe_layer_freq", None)
    return isinstance(flags, list | tuple) and bool(flags[layer])


def _of_types(rule: _IsMoE, *model_types: str) -> dict[str, _IsMoE]:
    return dict.fromkeys(model_types, rule)


_RULE_OF_MODEL_TYPE = {
    **_of_types(_every, "mixtral", "gpt_oss", "qwen3_5_moe_text"),
    **_of_types(
        _every_nth_but,
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe_text",
        "qwen3_omni_moe_text",
    ),
    **_of_types(_after_first, "glm4_moe", "glm4v_moe_text", "hy_v3", "bailing_moe", "bailing_moe_v2"),
    **_of_types(
        _after_first_every_nth,
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "kimi_k2",
        "kimi_linear",
    ),
    **_of_types(_after_dense, "afmoe", "lfm2_moe"),
    **_of_types(_between, "ernie4_5_moe"),
    **_of_types(_interleaved, "llama4_text"),
    **_of_types(_listed, "mimo_v2_flash"),
}


def _text(config: object, name: str) -> str:
    return str(getattr(config, name, ""))


def _whole(config: object, name: str, default: int | None = None) -> int:
    """A whole number of the configuration; TypeError when it has none and there is no default."""
    value = getattr(config, name, None)
    if value is None:
        value = default
    if type(value) is not int:
        raise TypeError(f"{name} is {value!r}, expected an integer")
    return value


def _numbers(values: Iterable[object]) -> frozenset[object]:
    return frozenset(values)
