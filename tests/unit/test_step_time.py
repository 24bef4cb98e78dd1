"""The step-time model against times worked out by hand, and what must rise or fall with what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_platform.expert_map import ExpertMap
from eplb_platform.heat import Phase
from eplb_platform.migration.schedule import build_schedule
from eplb_platform.offline.hardware import Device, HardwareProfile, Links, ModelShape
from eplb_platform.offline.step_time import RankWork, StepTime, even_shares, rank_work
from eplb_platform.topology import Topology

# An expert has 3 * 10 * 100 = 3,000 parameters of 2 bytes; a token travels in 10 * (1 + 3) = 40 bytes.
MODEL = ModelShape(
    hidden_size=10,
    expert_intermediate_size=100,
    experts_per_token=2,
    bytes_per_weight=2,
    dispatch_bytes_per_value=1,
    combine_bytes_per_value=3,
    other_parameters=500,
)
# 1e9 FLOP/s and 1e6 bytes/s of memory are attained.
DEVICE = Device(
    peak_tflops=0.002,
    compute_efficiency=0.5,
    memory_gb=1,
    memory_bandwidth_gb_s=0.002,
    memory_efficiency=0.5,
    layer_overhead_us=7,
)
LINKS = Links(
    ranks_per_node=2,
    intra_node_gb_s=0.004,
    inter_node_gb_s=0.001,
    efficiency=1,
    intra_node_latency_us=3,
    inter_node_latency_us=5,
    migration_share=0.5,
)
TOY = HardwareProfile(name="toy", device=DEVICE, links=LINKS, model=MODEL)
TWO_NODES = Topology(4, 2)


def work(tokens: list[list[float]], activated: list[list[float]]) -> RankWork:
    return RankWork(np.array(tokens, dtype=float), np.array(activated, dtype=float))


def test_prefill_by_hand() -> None:
    """The hottest rank has 8 tokens; a quarter of its tokens comes from its node, half from the other."""
    seconds = StepTime(TOY, TWO_NODES).layers(work([[8, 4, 2, 2]], [[2, 2, 1, 1]]), Phase.PREFILL)
    transfer = 8 * 40 * max(0.25 / 4e6, 0.5 / 1e6)
    experts = 8 * 2 * 3000 / 1e9
    other = 4 / 2 * 2 * 500 / 1e9
    assert seconds == pytest.approx([transfer + experts + other + 2 * 5e-6 + 7e-6])


def test_decode_by_hand() -> None:
    """The rank with most activated experts is not the one with most tokens: the slowest sum counts."""
    seconds = StepTime(TOY, Topology(4)).layers(work([[8, 4, 2, 2]], [[1, 3, 1, 1]]), Phase.DECODE)
    ranks = [tokens * 40 * 0.75 / 4e6 + active * 6000 / 1e6 for tokens, active in ((8, 1), (4, 3), (2, 1))]
    assert seconds == pytest.approx([max(ranks) + 500 * 2 / 1e6 + 2 * 3e-6 + 7e-6])


def test_mixed_is_the_larger_of_both_and_one_rank_sends_nothing() -> None:
    alone = StepTime(TOY, Topology(1))
    one = work([[1000]], [[1]])
    assert alone.transfer(one).tolist() == [[0.0]]
    for tokens, phase in ((1000, Phase.PREFILL), (1, Phase.DECODE)):
        one = work([[tokens]], [[0.1]])
        assert alone.experts(one, Phase.MIXED) == pytest.approx(alone.experts(one, phase))


def test_a_layer_without_tokens_takes_no_time() -> None:
    seconds = StepTime(TOY, TWO_NODES).layers(work([[0] * 4, [1] * 4], [[0] * 4, [1] * 4]), Phase.DECODE)
    assert seconds[0] == 0 and seconds[1] > 0


def test_migration_by_hand() -> None:
    """Ranks 0 and 1 share a node. Rank 0 gets expert 1 from its node, rank 2 gets expert 0 from the other."""
    old = ExpertMap([[0, 0, 1, 1, 2, 2, 3, 3]], 4, TWO_NODES)
    new = ExpertMap([[0, 1, 1, 1, 2, 0, 3, 3]], 4, TWO_NODES)
    (chunk,) = build_schedule(old, new, layers_per_chunk=1, staging_slots=2).chunks
    model = StepTime(TOY, TWO_NODES)
    assert model.fetch(chunk) == pytest.approx(6000 / 1e6 / 0.5 + 5e-6)
    assert model.swap(chunk) == pytest.approx(2 * 6000 / 1e6)


def test_work_by_hand() -> None:
    expert_map = ExpertMap([[0, 1, 0, 2]], 3, Topology(2))
    assert even_shares(expert_map).tolist() == [[0.5, 1, 0.5, 1]]
    found = rank_work([[1, 6, 0]], expert_map)
    assert found.tokens.tolist() == [[6.5, 0.5]]
    assert found.activated.tolist() == [[1.5, 0.5]]
    assert found.balancedness == pytest.approx(3.5 / 6.5)
    assert rank_work([[0, 0, 0]], expert_map).balancedness == 1.0


loads = st.lists(st.integers(0, 1000), min_size=8, max_size=8).map(lambda row: np.array([row], dtype=float))


@given(load=loads, phase=st.sampled_from(list(Phase)), factor=st.integers(1, 4))
def test_more_tokens_and_busier_links_never_take_less_time(
    load: np.ndarray, phase: Phase, factor: int
) -> None:
    expert_map = ExpertMap.initial(1, 8, TWO_NODES)
    model = StepTime(TOY, TWO_NODES)
    seconds = model.step(rank_work(load, expert_map), phase)
    assert model.step(rank_work(load * factor, expert_map), phase) >= seconds
    assert model.step(rank_work(load, expert_map), phase, free_links=1 / factor) >= seconds


@given(load=loads, phase=st.sampled_from(list(Phase)))
def test_level_ranks_are_never_slower(load: np.ndarray, phase: Phase) -> None:
    """Of the same tokens and activated experts, those that are spread evenly take the least time."""
    found = rank_work(load, ExpertMap.initial(1, 8, TWO_NODES))
    level = RankWork(
        *(
            np.broadcast_to(each.mean(axis=1, keepdims=True), (1, 4))
            for each in (found.tokens, found.activated)
        )
    )
    model = StepTime(TOY, TWO_NODES)
    assert model.step(level, phase) <= model.step(found, phase) * (1 + 1e-12)
