"""From load to plan: input checked, an algorithm run, its map measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_platform.algorithms.algorithm import Algorithm, AlgorithmError
from eplb_platform.algorithms.deepseek import serving_ranks_by_node
from eplb_platform.algorithms.discovery import OptionValue, make_algorithm
from eplb_platform.algorithms.slots import keep_slots
from eplb_platform.algorithms.survival import Survival, check_survival, survivable
from eplb_platform.balance import lower_bound, moved_experts, window_balancedness
from eplb_platform.expert_map import ExpertMap
from eplb_platform.topology import Topology

DEFAULT_ALGORITHM = "adaptive"


@dataclass(frozen=True, eq=False)
class Plan:
    """The next expert map and what it promises on the load that it was made for. Arrays are [layers].

    balancedness: sum over windows of the mean rank load / sum of the hottest rank's, 1.0 without load
    lower_bound: no valid map has sum of hottest / sum of mean below it, so balancedness <= 1 / lower_bound;
        where the algorithm keeps expert groups on nodes, no map that does
    moved_experts: experts that a rank must newly receive, against the current map or, where there is none,
        against the initial layout that engines start with
    unconstrained: what the algorithm gives without `survive`, where that was asked for: its price is the
        difference
    """

    expert_map: ExpertMap
    balancedness: NDArray[np.float64]
    lower_bound: NDArray[np.float64]
    moved_experts: NDArray[np.int64]
    algorithm: str
    unconstrained: Plan | None = None


def rebalance_experts(
    load: ArrayLike,
    *,
    num_physical_experts: int | None = None,
    topology: Topology,
    num_expert_groups: int = 1,
    current: ExpertMap | None = None,
    algorithm: str = DEFAULT_ALGORITHM,
    compute_cost: ArrayLike | None = None,
    survive: Survival = "none",
    **options: OptionValue,
) -> Plan:
    """Plan a rearrangement: the same input gives the same plan, whatever the number of threads.

    load: [layers, logical] or [windows, layers, logical], tokens per logical expert
    num_physical_experts: slots over all ranks, inactive ones included; None takes those of `current`
    topology: ranks, nodes and which ranks are active, perhaps others than in `current`
    num_expert_groups: DeepSeek's groups of neighbouring experts; they divide the experts evenly
    current: the map in use; experts that stay on their rank keep their slot
    compute_cost: [layers, logical], for algorithms that count it: the time that a token takes in an expert,
        in any unit, NaN for an expert that was not profiled; with it, the plan's measures are of the blend
    survive: "rank" or "node": every expert keeps a replica after the loss of any one; expert groups are then
        not kept on nodes
    options: go to the algorithm

    Raises ValueError for load that is negative or not finite, shapes that do not fit each other, too few
    slots, for `survive` too, an unknown algorithm or option; AlgorithmError where an algorithm fails its
    contract.
    """
    windows = _checked_load(load)
    _, num_layers, num_experts = windows.shape
    if current is not None:
        _check_current(current, num_layers, num_experts, topology)
        num_physical_experts = num_physical_experts or current.num_physical_experts
    slots = _checked_slots(num_physical_experts, num_experts, topology)
    _check_groups(num_expert_groups, num_experts)
    check_survival(survive, num_experts, slots, topology)
    engine = make_algorithm(algorithm, options)
    windows = engine.weigh(windows, _checked_cost(compute_cost, (num_layers, num_experts)))
    expert_map = place_experts(
        engine,
        windows,
        num_physical_experts=slots,
        topology=topology,
        num_expert_groups=num_expert_groups,
        current=current,
    )
    kept = groups_kept(engine, expert_map, num_expert_groups)
    plan = _measured(algorithm, expert_map, windows, current, kept)
    if survive == "none":
        return plan
    secured = survivable(expert_map, windows, survive)
    if current is not None:
        secured = keep_slots(secured, current)
    plan_of_secured = _measured(algorithm, ExpertMap(secured, num_experts, topology), windows, current, 1)
    return replace(plan_of_secured, unconstrained=plan)


def place_experts(
    algorithm: Algorithm,
    load: NDArray[np.float64],
    *,
    num_physical_experts: int,
    topology: Topology,
    num_expert_groups: int,
    current: ExpertMap | None,
) -> ExpertMap:
    """The map of `algorithm` for load that was checked and weighed, with the slots of experts that stay kept.

    Arguments as of `Algorithm.place`. Raises AlgorithmError where the algorithm fails its contract.
    """
    placed = algorithm.place(
        load,
        num_physical_experts=num_physical_experts,
        topology=topology,
        num_expert_groups=num_expert_groups,
        current=current,
    )
    shape, num_experts = (load.shape[1], num_physical_experts), load.shape[2]
    expert_map = _checked_map(algorithm.name, placed, shape, num_experts, topology)
    if current is None:
        return expert_map
    return ExpertMap(keep_slots(expert_map.physical_to_logical, current), num_experts, topology)


def groups_kept(algorithm: Algorithm, expert_map: ExpertMap, num_expert_groups: int) -> int:
    """The expert groups that `algorithm` keeps on nodes in maps like this: all of them, or 1 for none."""
    node_ranks = serving_ranks_by_node(
        expert_map.topology, expert_map.num_logical_experts, num_expert_groups, expert_map.slots_per_rank
    )
    return num_expert_groups if algorithm.hierarchical and len(node_ranks) > 1 else 1


def _measured(
    algorithm: str,
    expert_map: ExpertMap,
    windows: NDArray[np.float64],
    current: ExpertMap | None,
    num_groups_kept: int,
) -> Plan:
    old = current or ExpertMap.initial(
        expert_map.num_layers,
        expert_map.num_logical_experts,
        expert_map.topology,
        expert_map.num_redundant_experts,
    )
    return Plan(
        expert_map=expert_map,
        balancedness=window_balancedness(expert_map, windows),
        lower_bound=lower_bound(
            windows, expert_map.num_physical_experts, expert_map.topology, num_groups_kept
        ),
        moved_experts=moved_experts(old, expert_map),
        algorithm=algorithm,
    )


def _checked_load(load: ArrayLike) -> NDArray[np.float64]:
    """`load` as finite float64 [windows, layers, logical], one window of zeros where there is none."""
    array = np.asarray(load)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"load has dtype {array.dtype}, expected integers or floats")
    if array.ndim not in (2, 3) or 0 in array.shape[-2:]:
        raise ValueError(
            f"load has shape {array.shape}, expected [layers, logical] or [windows, layers, logical]"
        )
    windows = np.array(array, dtype=np.float64, ndmin=3, order="C")
    wrong = np.argwhere(~np.isfinite(windows) | (windows < 0))
    if len(wrong):
        window, layer, expert = wrong[0]
        raise ValueError(
            f"load of layer {layer}, expert {expert}, window {window} is {windows[window, layer, expert]}, "
            "expected a finite number of tokens of at least 0"
        )
    return windows if len(windows) else np.zeros((1, *windows.shape[1:]))


def _checked_cost(cost: ArrayLike | None, shape: tuple[int, int]) -> NDArray[np.float64] | None:
    """`cost` as float64 [layers, logical], NaN where there is none."""
    if cost is None:
        return None
    array = np.asarray(cost, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"compute_cost has shape {array.shape}, expected [layers, logical], {shape}")
    wrong = np.argwhere(np.isinf(array) | (array < 0))
    if len(wrong):
        layer, expert = wrong[0]
        raise ValueError(
            f"compute cost of layer {layer}, expert {expert} is {array[layer, expert]}, "
            "expected a time of at least 0, or NaN where there is none"
        )
    return array


def _check_current(current: ExpertMap, num_layers: int, num_experts: int, topology: Topology) -> None:
    for what, of_map, expected in (
        ("layers", current.num_layers, num_layers),
        ("logical experts", current.num_logical_experts, num_experts),
        ("ranks", current.topology.num_ranks, topology.num_ranks),
    ):
        if of_map != expected:
            raise ValueError(f"the current map has {of_map} {what}, but load and topology {expected}")


def _checked_slots(num_physical_experts: int | None, num_experts: int, topology: Topology) -> int:
    if num_physical_experts is None:
        raise ValueError("num_physical_experts is missing, and there is no current map to take it from")
    slots, rest = divmod(num_physical_experts, topology.num_ranks)
    if rest or slots < 1:
        raise ValueError(
            f"num_physical_experts is {num_physical_experts}, "
            f"expected a multiple of the {topology.num_ranks} ranks"
        )
    if slots * topology.num_active_ranks < num_experts:
        raise ValueError(
            f"{num_experts} logical experts do not fit in {slots} slots on each of "
            f"{topology.num_active_ranks} active ranks: give more physical experts"
        )
    return num_physical_experts


def _check_groups(num_expert_groups: int, num_experts: int) -> None:
    if num_expert_groups < 1 or num_experts % num_expert_groups:
        raise ValueError(
            f"num_expert_groups is {num_expert_groups}, "
            f"expected a divisor of the {num_experts} logical experts"
        )


def _checked_map(
    algorithm: str, placed: NDArray[np.int32], shape: tuple[int, int], num_experts: int, topology: Topology
) -> ExpertMap:
    if placed.shape != shape:
        raise AlgorithmError(f"algorithm {algorithm!r} made a map of shape {placed.shape}, expected {shape}")
    try:
        return ExpertMap(placed, num_experts, topology)
    except ValueError as error:
        raise AlgorithmError(f"algorithm {algorithm!r} made an invalid map: {error}") from error
