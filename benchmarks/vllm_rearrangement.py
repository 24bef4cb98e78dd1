"""What rearranging costs the forward passes of a vLLM engine: vLLM's own EPLB and ours, on the same traffic.

Both serve the demo's model on two CPU ranks, in turn, with the same interval and redundancy. vLLM's EPLB,
which knows no CPU, is enabled for the comparison with what the plugin has for CPUs, and rearranges in one
forward pass (`use_async: false`); its asynchronous mode needs an accelerator. The traffic shifts twice. What
a busy machine takes from a pass counts for whoever is being measured.

    .venv-vllm/bin/python benchmarks/vllm_rearrangement.py --interval 64
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRAFFIC = (("python", "c"), ("json", "table"), ("markup", "prose"))
ENGINES = ("vllm", "ours")
REDUNDANT = 16


@dataclass(frozen=True)
class Measured:
    """One engine on all traffic."""

    engine: str
    forwards: int
    rearrangements: int
    moved_experts: int
    median_forward_ms: float
    median_extra_ms: float
    longest_rearranging_forward_ms: float
    """The longest pass in which the map changed."""
    rearrangement_ms: float
    """Median time that EPLB took from a pass in which the map changed."""
    longest_extra_ms: float
    """Most that EPLB took from any pass."""
    balancedness: float
    """Mean rank load / maximum rank load over the passes after the first rearrangement, mean over layers."""
    balancedness_before: float
    """The same of the passes before it."""


def serve(engine: str, options: argparse.Namespace) -> Measured:
    """Run in a process of its own: one engine."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1",
        VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    from vllm import LLM, SamplingParams
    from vllm.config import EPLBConfig

    from eplb_platform.integrations.vllm import cpu_platform

    common: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True,
        "enable_prefix_caching": False, "skip_tokenizer_init": True, "tensor_parallel_size": 2,
        "enable_expert_parallel": True, "worker_cls": "measured_worker.MeasuredWorker",
    }  # fmt: skip
    if engine == "ours":
        keys = {
            "dynamic_eplb": True,
            "num_redundant_experts": REDUNDANT,
            "expert_heat_collection_interval": options.interval,
            "algorithm_execution_interval": 0,
        }
        common["additional_config"] = {"eplb_config": keys}
    else:
        cpu_platform.admit_eplb()
        common["enable_eplb"] = True
        common["eplb_config"] = EPLBConfig(
            num_redundant_experts=REDUNDANT, window_size=options.interval, step_interval=options.interval,
            use_async=False, communicator="torch_nccl",
        )  # fmt: skip
    llm = LLM(options.model, **common)
    greedy = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True, detokenize=False)
    draw = np.random.default_rng(options.seed)
    llm.generate(prompts(("python",), draw), greedy, use_tqdm=False)  # what is compiled or touched first
    llm.collective_rpc("measured_steps")
    for kinds in TRAFFIC:
        for _ in range(options.rounds):
            llm.generate(prompts(kinds, draw), greedy, use_tqdm=False)
    return summarise(engine, llm.collective_rpc("measured_steps"))


def prompts(kinds: tuple[str, ...], draw: np.random.Generator) -> list[Any]:
    """Eight chunks of 48 bytes."""
    chosen = []
    for index in range(8):
        text = (files("eplb_platform.demo") / "texts" / f"{kinds[index % len(kinds)]}.txt").read_bytes()
        start = int(draw.integers(len(text) - 48))
        chosen.append({"prompt_token_ids": list(text[start : start + 48])})
    return chosen


def summarise(engine: str, ranks: list[list[dict[str, Any]]]) -> Measured:
    """Passes of all ranks, step by step: a pass takes as long as its slowest rank."""
    seconds = np.array([[step["seconds"] for step in steps] for steps in ranks]).max(axis=0)
    extra = np.array([[step["eplb_s"] for step in steps] for steps in ranks]).max(axis=0)
    arrivals = np.array([step["arrivals"] for step in ranks[0]])
    load = np.array([step["rank_load"] for step in ranks[0]], dtype=np.float64)
    for steps in ranks[1:]:
        load += np.array([step["rank_load"] for step in steps])
    changed = arrivals > 0
    first = int(np.argmax(changed)) + 1 if changed.any() else len(load)
    return Measured(
        engine=engine,
        forwards=len(seconds),
        rearrangements=int(changed.sum()),
        moved_experts=int(arrivals.sum()),
        median_forward_ms=1e3 * float(np.median(seconds)),
        median_extra_ms=1e3 * float(np.median(extra)),
        longest_rearranging_forward_ms=1e3 * float(seconds[changed].max(initial=0.0)),
        rearrangement_ms=1e3 * float(np.median(extra[changed])) if changed.any() else 0.0,
        longest_extra_ms=1e3 * float(extra.max()),
        balancedness=balancedness(load[first:]),
        balancedness_before=balancedness(load[:first]),
    )


def balancedness(load: NDArray[np.float64]) -> float:
    """load: [passes, layers, ranks]"""
    recorded = load[load.sum(axis=(1, 2)) > 0]
    if not len(recorded):
        return float("nan")
    per_layer = recorded.mean(axis=2).sum(axis=0) / recorded.max(axis=2).sum(axis=0)
    return float(per_layer.mean())


def measure(engine: str, arguments: list[str]) -> Measured:
    """Start this script again for one engine, so that each has processes of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, __file__, *arguments, "--engine", engine, "--result", result.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise SystemExit(f"{engine}: ended with {done.returncode}\n{done.stderr[-6000:]}")
        return Measured(**json.loads(Path(result.name).read_text()))


def show(results: list[Measured]) -> None:
    rows = [
        ("forward passes", "forwards", "{:d}"),
        ("passes in which the map changed", "rearrangements", "{:d}"),
        ("experts moved", "moved_experts", "{:d}"),
        ("balancedness before the first change", "balancedness_before", "{:.3f}"),
        ("balancedness after it", "balancedness", "{:.3f}"),
        ("forward pass, median, ms", "median_forward_ms", "{:.2f}"),
        ("of it EPLB, median, ms", "median_extra_ms", "{:.2f}"),
        ("EPLB in a pass that changes the map, median, ms", "rearrangement_ms", "{:.2f}"),
        ("EPLB in a pass, longest, ms", "longest_extra_ms", "{:.2f}"),
        ("forward pass that changes the map, longest, ms", "longest_rearranging_forward_ms", "{:.2f}"),
    ]
    print(f"{'':50}" + "".join(f"{result.engine:>12}" for result in results))
    for label, name, form in rows:
        print(f"{label:50}" + "".join(f"{form.format(getattr(result, name)):>12}" for result in results))
    theirs, ours = results
    longest, median = theirs.longest_extra_ms, theirs.rearrangement_ms
    print(
        f"the most that ours took from a pass is {ours.longest_extra_ms / median:.3f} of vLLM's median "
        f"rearrangement, {ours.longest_extra_ms / longest:.3f} of its longest"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    demo = str(files("eplb_platform.demo") / "checkpoint")
    parser.add_argument("--model", default=demo, help="a folder; token ids up to 255 are served")
    parser.add_argument("--interval", type=int, default=64, help="forward passes between rearrangements")
    parser.add_argument("--rounds", type=int, default=8, help="batches for each kind of traffic")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate for each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("skipped, vLLM is not installed here: make vllm, then .venv-vllm/bin/python", sys.argv[0])
        return
    if options.engine:
        options.result.write_text(json.dumps(asdict(serve(options.engine, options))))
        return
    show([measure(engine, sys.argv[1:]) for engine in ENGINES])


if __name__ == "__main__":
    main()
