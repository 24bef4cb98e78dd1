"""`eplb advise`: what to deploy for recorded load, why, and how."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from eplb_platform.algorithms import AlgorithmError
from eplb_platform.cli import BadInput, bad_input
from eplb_platform.cli.estimating import Deployment
from eplb_platform.cli.files import iterations, read_trace
from eplb_platform.cli.tables import plain_lines, right_aligned
from eplb_platform.offline.advise import Advice, Choice, Question, advise
from eplb_platform.offline.report import steps_of
from eplb_platform.records.fault import RecordError, describe
from eplb_platform.records.load_trace import LoadTrace

MEMORY_PART = 0.6
"""Of the device's memory, for experts, where --memory does not say it."""
OF_VLLM_ASCEND = (
    "dynamic_eplb",
    "expert_map_path",
    "num_redundant_experts",
    "expert_heat_collection_interval",
    "algorithm_execution_interval",
)


@dataclass(frozen=True)
class Request:
    """What the command was asked for; see the options of `eplb advise`."""

    trace: Path
    memory_gb: float | None = None
    ep_sizes: Sequence[str] = ()
    deployment: Deployment = field(default_factory=Deployment)
    algorithm: str = "adaptive"
    objective: str = "throughput"
    iter_range: str | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """The advice, and the trace that it is for."""

    request: Request
    trace: LoadTrace
    advice: Advice

    def print(self, console: Console) -> None:
        """The table, the reasons, and what to paste, for people."""
        advice = self.advice
        table = right_aligned(
            "ranks", "slots", "redundant", "placement", "GB", "balanced", "step ms", "tokens/s"
        )
        for choice in advice.choices:
            table.add_row(_mark(choice, is_chosen=choice is advice.chosen), *_cells(choice))
        plain_lines(
            console,
            f"{self.request.trace}: planned on {advice.num_planned_steps} steps, judged on the rest, for "
            f"{advice.question.profile.name}, {advice.question.memory_gb:g} GB a rank for experts",
        )
        console.print(table)
        plain_lines(
            console,
            "->: advised. *: no other has less memory, better balance and a shorter step.",
            "GB, tokens/s: of a rank. balanced: mean / max rank load of a step. Estimates, by the",
            "formulae in docs/offline.md.",
            "",
            *(f"- {reason}" for reason in advice.reasons()),
            "",
            *self._commands(),
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        advice = self.advice
        return {
            "trace": str(self.request.trace),
            "memory_gb": advice.question.memory_gb,
            "hardware": advice.question.profile.model_dump(),
            "planned_steps": advice.num_planned_steps,
            "simulated_steps": advice.num_simulated_steps,
            "choices": [
                _choice_dict(choice) | {"chosen": choice is advice.chosen} for choice in advice.choices
            ],
            "static": {
                "balancedness": float(advice.static.balancedness.mean()),
                "tokens_per_s": advice.static.throughput,
            },
            "dynamic": [
                {
                    "expert_heat_collection_interval": interval,
                    "balancedness": float(result.balancedness.mean()),
                    "tokens_per_s": result.throughput,
                    "experts_moved": result.experts_moved,
                    "longest_wait_s": result.longest_wait_s,
                }
                for interval, result in advice.dynamic.items()
            ],
            "mode": "static" if advice.interval is None else "dynamic",
            "reasons": advice.reasons(),
            "eplb_config": advice.eplb_config(),
            "commands": {
                "plan": self.plan_command(),
                "vllm": self.vllm_command(),
                "vllm_ascend": self.ascend_command(),
                "sglang": self.sglang_flags(),
                "tensorrt_llm": self.tensorrt_llm_configuration(),
            },
        }

    def plan_command(self) -> str | None:
        """The command that makes the static map; None for a dynamic deployment."""
        chosen = self.advice.chosen
        if self.advice.interval is not None:
            return None
        slots = chosen.slots_per_rank * chosen.topology.num_ranks
        groups = self.request.deployment.num_expert_groups if chosen.is_hierarchical else 1
        return shlex.join(
            [
                "eplb", "plan", str(self.request.trace), "--ep-size", str(chosen.topology.num_ranks),
                "--num-slots", str(slots), "--num-nodes", str(chosen.topology.num_nodes),
                *(("--num-expert-groups", str(groups)) if groups > 1 else ()),
                *(("--iter-range", self.request.iter_range) if self.request.iter_range else ()),
                *(("--algorithm", self.request.algorithm) if self.request.algorithm != "adaptive" else ()),
                "-o", "map.json",
            ]
        )  # fmt: skip

    def vllm_command(self) -> str:
        """For vLLM with this project's plugin."""
        return self._serve(self.advice.eplb_config())

    def ascend_command(self) -> str:
        """For vllm-ascend's own balancer, with the keys that it knows."""
        config = {key: value for key, value in self.advice.eplb_config().items() if key in OF_VLLM_ASCEND}
        switch = "" if self.advice.interval is None else "DYNAMIC_EPLB=true "
        return switch + self._serve(config)

    def sglang_flags(self) -> str:
        """For SGLang: with its own balancer, or with the map that `eplb plan -o map.pt` makes."""
        chosen, interval = self.advice.chosen, self.advice.interval
        redundant = f"--ep-num-redundant-experts {chosen.redundant_experts}"
        how = (
            "--init-expert-location map.pt"
            if interval is None
            else f"--enable-eplb --eplb-rebalance-num-iterations {interval}"
        )
        return f"--ep-size {chosen.topology.num_ranks} {redundant} {how}"

    def tensorrt_llm_configuration(self) -> str:
        """For TensorRT-LLM: with its own balancer, or with the map that `eplb plan -o map.yaml` makes."""
        ranks = self.advice.chosen.topology.num_ranks
        slots = self.advice.chosen.slots_per_rank * ranks
        own = f"{{num_slots: {slots}, layer_updates_per_iter: 1}}"
        balancer = "map.yaml" if self.advice.interval is None else own
        return f"moe_expert_parallel_size: {ranks}, moe_config: {{load_balancer: {balancer}}}"

    def _serve(self, config: dict[str, object]) -> str:
        text = json.dumps({"eplb_config": config})
        ranks = self.advice.chosen.topology.num_ranks
        command = f"vllm serve MODEL --data-parallel-size {ranks} --enable-expert-parallel"
        return f"{command} --additional-config {shlex.quote(text)}"

    def _commands(self) -> list[str]:
        if self.advice.chosen.topology.num_ranks == 1:
            return ["One rank has nothing to balance: serve without a balancer."]
        plan = self.plan_command()
        return [
            *(("The map:", f"  {plan}") if plan else ()),
            "vLLM, with eplb_platform beside it (or any tensor x data parallelism of as many ranks):",
            f"  {self.vllm_command()}",
            "vllm-ascend, with its own balancer:",
            f"  {self.ascend_command()}",
            f"SGLang, {'with -o map.pt' if plan else 'with its own balancer'}:",
            f"  {self.sglang_flags()}",
            f"TensorRT-LLM's configuration file, {'with -o map.yaml' if plan else 'with its own balancer'}:",
            f"  {self.tensorrt_llm_configuration()}",
        ]


def run(request: Request, progress: Callable[[str, int, int], None]) -> Outcome:
    """Search. Raises BadInput."""
    try:
        trace = read_trace(request.trace)
        profile = request.deployment.profile(trace)
        if request.memory_gb is not None and not math.isfinite(request.memory_gb):
            raise BadInput(f"--memory {request.memory_gb:g}: expected a number of GB")
        memory = profile.device.memory_gb * MEMORY_PART if request.memory_gb is None else request.memory_gb
        question = Question(
            profile,
            memory,
            ep_sizes=_sizes(request.ep_sizes),
            num_expert_groups=request.deployment.num_expert_groups,
            algorithm=request.algorithm,
            for_latency=request.objective == "latency",
        )
        advice = advise(
            trace, question, steps=steps_of(trace, iterations(request.iter_range)), progress=progress
        )
    except BadInput as error:
        raise bad_input("advise", error) from error
    except OSError as error:
        raise BadInput(f"advise: {error.filename or request.trace}: {describe(error)}") from error
    except (RecordError, AlgorithmError, ValueError) as error:
        raise bad_input("advise", error) from error
    return Outcome(request, trace, advice)


def _sizes(texts: Sequence[str]) -> list[int]:
    for text in texts:
        if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1 << 16):
            raise BadInput(f"--ep-size {text}: expected numbers of ranks, as 16,32")
    return sorted({int(text) for text in texts})


def _mark(choice: Choice, *, is_chosen: bool) -> str:
    return ("-> " if is_chosen else "   ") + ("*" if choice.on_front else "")


def _cells(choice: Choice) -> list[str]:
    return [
        str(choice.topology.num_ranks),
        str(choice.slots_per_rank),
        str(choice.redundant_experts),
        "hierarchical" if choice.is_hierarchical else "global",
        f"{choice.memory_gb:.1f}",
        f"{choice.balancedness:.4f}",
        f"{choice.step_s * 1e3:.2f}",
        f"{choice.tokens_per_s:,.0f}",
    ]


def _choice_dict(choice: Choice) -> dict[str, object]:
    return {
        "ep_size": choice.topology.num_ranks,
        "nodes": choice.topology.num_nodes,
        "slots_per_rank": choice.slots_per_rank,
        "redundant_experts": choice.redundant_experts,
        "hierarchical": choice.is_hierarchical,
        "memory_gb": choice.memory_gb,
        "balancedness": choice.balancedness,
        "step_s": choice.step_s,
        "tokens_per_s_per_rank": choice.tokens_per_s,
        "on_pareto_front": choice.on_front,
    }
