"""What the plugin changes of vLLM on CPUs, and what it finds missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("vllm")
from vllm.config import ParallelConfig
from vllm.platforms import current_platform

from eplb_platform.integrations.vllm import compatibility, cpu_platform
from eplb_platform.integrations.vllm.compatibility import Feature, UnsupportedVllm, check_vllm

if not current_platform.is_cpu():
    pytest.skip("vLLM is not built for CPUs", allow_module_level=True)

REFUSED_THEN_ADMITTED = """
import sys
from vllm.config import ParallelConfig, parallel
from eplb_platform.integrations.vllm import cpu_platform
options = dict(enable_eplb=True, enable_expert_parallel=True, tensor_parallel_size=2)
try:
    ParallelConfig(**options)
except ValueError as error:
    assert "CUDA" in str(error), error
else:
    sys.exit("vLLM admits EPLB on CPUs by itself")
cpu_platform.admit_eplb()
admitted = parallel.current_platform
cpu_platform.admit_eplb()
assert parallel.current_platform is admitted
assert admitted.is_cpu() and admitted.device_type == "cpu" and not admitted.is_cuda()
config = ParallelConfig(**options)
assert config.eplb_config.communicator == "torch_gloo"
from vllm.platforms import current_platform
assert not current_platform.is_cuda_alike()
"""


def test_eplb_is_admitted_on_a_cpu_and_nothing_else_changes() -> None:
    subprocess.run([sys.executable, "-c", REFUSED_THEN_ADMITTED], check=True, timeout=600)


def test_what_vllm_asks_of_eplb_is_still_asked() -> None:
    cpu_platform.admit_eplb()
    with pytest.raises(ValueError, match="enable_expert_parallel must be True"):
        ParallelConfig(enable_eplb=True, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="EPLB requires tensor"):
        ParallelConfig(enable_eplb=True, enable_expert_parallel=True)


def test_equipping_twice_changes_nothing_more() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.router import base_router
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    cpu_platform.equip_worker()
    before = (
        CPUUnquantizedExperts.apply, base_router.eplb_map_to_physical_and_record, CPUModelRunner.load_model
    )  # fmt: skip
    cpu_platform.equip_worker()
    assert before == (
        CPUUnquantizedExperts.apply, base_router.eplb_map_to_physical_and_record, CPUModelRunner.load_model
    )  # fmt: skip
    check_vllm()  # what is wrapped is still recognised


def test_everything_that_is_wrapped_is_there() -> None:
    assert len(compatibility.expected()) >= 10
    check_vllm()


@pytest.mark.parametrize(
    ("feature", "named"),
    [
        (Feature("vllm.no_such_module:thing"), "vllm.no_such_module"),
        (Feature("vllm.distributed.eplb.eplb_state:EplbState.gone"), "eplb_state:EplbState.gone"),
        (
            Feature("vllm.distributed.eplb.eplb_state:EplbState.step", ("is_dummy", "is_new")),
            "the parameter is_new of vllm.distributed.eplb.eplb_state:EplbState.step",
        ),
    ],
)
def test_what_is_missing_is_named_in_one_line(feature: Feature, named: str) -> None:
    with pytest.raises(UnsupportedVllm) as caught:
        check_vllm([feature])
    message = str(caught.value)
    assert named in message and "\n" not in message
    assert compatibility.vllm_version() in message and "tested with vLLM 0.32.0" in message


def test_another_devices_needs_are_not_asked_of_this_one() -> None:
    check_vllm([Feature("vllm.no_such_module:thing", needed_on=("cuda",))])


def test_replacing_keeps_the_original_and_happens_once() -> None:
    class Parent:
        def answer(self, value: int) -> int:
            return value

    class Child(Parent):
        pass

    def doubled(answer):  # type: ignore[no-untyped-def]
        return lambda self, value: 2 * answer(self, value)

    original = Parent.answer
    for _ in range(2):
        compatibility.replace(Parent, "answer", doubled)
    assert Parent().answer(3) == 6 and compatibility.original(Parent.answer) is original
    compatibility.replace(Child, "answer", doubled)
    assert Child().answer(3) == 12 and Parent().answer(3) == 6
