"""The map of `expert_map_path`: whether it fits the engine, and the part of it that a stage takes."""

from __future__ import annotations

from eplb_platform.config import ConfigError
from eplb_platform.expert_map import ExpertMap


def check_ranks(expert_map: ExpertMap, ep_size: int, path: str) -> None:
    """Raise ConfigError for a map of another number of ranks than the engine's EP size."""
    num_ranks = expert_map.topology.num_ranks
    if num_ranks != ep_size:
        raise ConfigError(
            f"{path}: a map for {num_ranks} ranks, but the EP size of this engine is {ep_size}; "
            f"make one with `eplb plan --ep-size {ep_size}`"
        )


def check_redundancy(expert_map: ExpertMap, configured: int | None, path: str) -> None:
    """Raise ConfigError when `num_redundant_experts` is configured to be another than the map's."""
    if configured is not None and configured != expert_map.num_redundant_experts:
        raise ConfigError(
            f"eplb_config.num_redundant_experts: {configured}, but the map in {path} has "
            f"{expert_map.num_redundant_experts} redundant experts; leave the key out, the file says it"
        )


def check_model(expert_map: ExpertMap, num_experts: int, num_moe_layers: int | None, path: str) -> None:
    """Raise ConfigError for a map of another model.

    num_experts: logical experts of a layer of the model
    num_moe_layers: MoE layers of the model, of all pipeline stages; None when that is not known yet
    """
    if expert_map.num_logical_experts != num_experts:
        raise ConfigError(
            f"{path}: a map of {expert_map.num_logical_experts} logical experts, "
            f"but the model has {num_experts} in a layer"
        )
    if num_moe_layers is not None and expert_map.num_layers != num_moe_layers:
        raise ConfigError(
            f"{path}: a map of {expert_map.num_layers} layers, but the model has {num_moe_layers} MoE layers"
        )


def part_of_map(
    expert_map: ExpertMap, *, first_layer: int, num_layers: int, total_layers: int, path: str | None = None
) -> ExpertMap:
    """The layers of one pipeline stage, out of a map of all stages.

    first_layer: MoE layers of the stages before this one
    num_layers: MoE layers of this stage
    total_layers: MoE layers of all stages

    Raises ConfigError when the map is not one of `total_layers` layers, ValueError for a stage that is not
    in them or has none.
    """
    if expert_map.num_layers != total_layers:
        place = f"{path}: " if path else "expert_map_path: "
        raise ConfigError(
            f"{place}a map of {expert_map.num_layers} layers, but the model has {total_layers} MoE layers"
        )
    if not 0 <= first_layer < first_layer + num_layers <= total_layers:
        raise ValueError(
            f"a stage of MoE layers {first_layer} to {first_layer + num_layers - 1} "
            f"in a model of {total_layers}"
        )
    if num_layers == total_layers:
        return expert_map
    rows = expert_map.physical_to_logical[first_layer : first_layer + num_layers]
    return ExpertMap(rows, expert_map.num_logical_experts, expert_map.topology)


def check_fits(part: ExpertMap, model_map: ExpertMap, path: str) -> None:
    """Raise ConfigError unless `part` can stand where the model's own map stands.

    model_map: the map that the engine's tables hold before anything was moved
    """
    check_ranks(part, model_map.topology.num_ranks, path)
    check_model(part, model_map.num_logical_experts, model_map.num_layers, path)
    if part.num_physical_experts != model_map.num_physical_experts:
        raise ConfigError(
            f"{path}: a map of {part.num_physical_experts} physical experts, "
            f"but the engine made room for {model_map.num_physical_experts}"
        )
