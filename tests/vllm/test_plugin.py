"""What the plugin does to a process of vLLM that has nothing to balance: next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, sys
from vllm.plugins import load_plugins_by_group
register = load_plugins_by_group("vllm.general_plugins")["eplb_platform"]
before = set(sys.modules)
register()
register()
loaded = sorted(set(sys.modules) - before)
import vllm.engine.arg_utils as arg_utils
import vllm.v1.worker.worker_base as worker_base
from vllm.distributed.eplb.eplb_state import EplbState
import vllm.config.parallel as parallel
wrapped = arg_utils.EngineArgs.create_engine_config
print(json.dumps({
    "loaded": loaded,
    "front_end": hasattr(wrapped, "__wrapped__") and not hasattr(wrapped.__wrapped__, "__wrapped__"),
    "workers": hasattr(worker_base.WorkerBase.__init__, "__wrapped__"),
    "eplb_state": hasattr(EplbState.step, "__wrapped__"),
    "platform": type(parallel.current_platform).__name__,
}))
"""


def test_registering_loads_no_module_of_vllm_and_changes_nothing_but_two_entrances() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert all(name.startswith("eplb_platform") for name in seen["loaded"]), seen["loaded"]
    assert len(seen["loaded"]) <= 3
    assert seen["front_end"], "wrapped once"
    assert seen["workers"]
    assert not seen["eplb_state"], "only an engine with eplb_config replaces methods"
    assert seen["platform"] != "_EplbPlatform"
