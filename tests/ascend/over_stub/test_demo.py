"""`eplb demo` on `npu` devices: a whole model, whole cycles, and the tokens that the CPU generates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eplb_platform.demo.run import DemoResult, run_demo
from eplb_platform.demo.settings import DemoSettings, Serving, check


class Unwatched:
    def begin(self, *given: object) -> None: ...

    def update(self, *given: object) -> None: ...

    def end(self, *given: object) -> None: ...


def demo(folder: Path, backend: str, steps: int) -> DemoResult:
    """Two ranks, few forward passes: what they are, not how well they are balanced."""
    settings = DemoSettings(
        ranks=2,
        backend=backend,
        steps=steps,
        heat_interval=8,
        plan_interval=2,
        serving=Serving(sequences=8, prompt_tokens=4, forwards_per_batch=8),
        expert_map_record_path=folder / f"{backend}.json",
        picture=folder / f"{backend}.png",
    )
    return run_demo(check(replace(settings)), Unwatched())


@pytest.mark.timeout(900)
def test_its_tokens_are_those_of_the_cpu(tmp_path: Path) -> None:
    for steps in (24, 96, 384):  # how many passes a cycle takes is up to the machine
        on_device = demo(tmp_path, "ascend", steps)
        if on_device.phases["dynamic"].moved_experts:
            break
    on_host = demo(tmp_path, "cpu", steps)
    assert on_device.different_tokens == []
    for name, phase in on_device.phases.items():
        for device, host in zip(phase.tokens, on_host.phases[name].tokens, strict=True):
            np.testing.assert_array_equal(device, host)
    dynamic = on_device.phases["dynamic"]
    assert dynamic.cycles >= 1
    assert dynamic.moved_experts > 0
    assert dynamic.failed_cycles == 0, dynamic.last_error
