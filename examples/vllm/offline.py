"""The engine and the traffic of the offline examples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from demo_model import write_demo_model  # type: ignore[import-not-found]  # beside this script

if TYPE_CHECKING:
    from vllm import LLM

KINDS = ("json", "table", "markup", "prose")


def two_rank_engine(model: str | None, eplb_config: Mapping[str, object]) -> LLM:
    """A float32 engine on two ranks of this machine's CPU, balanced as `eplb_config` says."""
    # One thread for each rank, pinned to none, and a small KV cache: two ranks fit on two cores.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vllm import LLM

    folder = model or str(write_demo_model(Path("eplb-demo-model")))
    return LLM(
        folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        enforce_eager=True,
        additional_config={"eplb_config": dict(eplb_config)},
    )


def generate_texts(engine: LLM, rounds: int) -> None:
    """Continue chunks of the demo's texts, greedily."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    for round_ in range(rounds):
        texts = [(files("eplb_platform.demo") / "texts" / f"{kind}.txt").read_text("utf-8") for kind in KINDS]
        starts = [(round_ * 4 + place) * 997 % (len(texts[0]) - 64) for place in range(4)]
        engine.generate([text[start : start + 64] for text in texts for start in starts], greedy)
