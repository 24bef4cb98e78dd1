"""The commands and their options; those of several commands are in `options`.

What a command needs is imported when it runs, so that `--help` stays quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from eplb_platform.cli import BAD_INPUT
from eplb_platform.cli.options import (
    AsJson,
    EpSize,
    ExpertGroups,
    FormatOption,
    Hardware,
    IterRange,
    ModelOption,
    NumNodes,
    Trace,
    names,
)
from eplb_platform.cli.output import progress, show_lines, show_tables
from eplb_platform.limits import MOST_DENSE_LAYERS, MOST_RANKS, MOST_SLOTS

application = typer.Typer(
    name="eplb",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@application.callback()
def eplb() -> None:
    """Expert parallelism load balancing for mixture-of-experts models.

    \b
    From recorded load (of SGLang, TensorRT-LLM, vLLM with this plugin) to a deployed map:
      eplb report DUMP --ep-size 16             how unbalanced is it?
      eplb advise DUMP --memory 48              what to deploy, and why
      eplb plan DUMP --ep-size 16 --num-slots 272 -o map.json
      eplb report LATER --map map.json          what the map does on other load
      eplb validate map.json --ep-size 16       is it sound, and for this engine?
    vllm-ascend, and vLLM with this plugin, serve with it by
      --additional-config '{"eplb_config": {"expert_map_path": "map.json"}}'
    and `eplb convert map.json -o map.yaml` makes it one for another engine.
    """


@application.command()
def backends(as_json: AsJson = False) -> None:
    """List the backends and whether they can be used.

    A backend is for one family of devices; it is found when its package is installed.
    """
    from dataclasses import asdict

    from eplb_platform.cli.listing import examine_backends

    reports = examine_backends()
    if as_json:
        typer.echo(json.dumps([{**asdict(report), "versions": dict(report.versions)} for report in reports]))
        return
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        state = "usable" if report.usable else f"not usable: {report.reason}"
        typer.echo(
            f"{report.name:10} {report.device_type:6} {report.collective:6} {state}  {versions}".rstrip()
        )


@application.command()
def status(
    engine: Annotated[
        str,
        typer.Argument(
            metavar="ENGINE",
            help="Its metrics (http://host:port/metrics), a state file, or a folder of them.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Say what the balancer of a running engine does, when it last succeeded, and what it waits for."""
    from eplb_platform.cli.engine_status import lines, read_status

    models = read_status(engine)
    if as_json:
        typer.echo(json.dumps([model.as_dict() for model in models]))
    else:
        for line in lines(models):
            typer.echo(line)


@application.command()
def validate(
    map_file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An expert map or recorded load, of any engine.")
    ],
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            "--ep-size",
            min=1,
            max=MOST_RANKS,
            help="The ranks it must be for; only vllm-ascend's maps say it.",
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="The number of logical experts in a layer.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="The number of mixture-of-experts layers.")
    ] = None,
    format: FormatOption = None,
    as_json: AsJson = False,
) -> int:
    """List every fault of a map, or the first of a record.

    One line for each fault, with its place in the file; exit code 2 when there is one.

    \b
    Example: eplb validate map.json --ep-size 16 --experts 256 --layers 58
    Next:    start the engine with the map (expert_map_path in eplb_config for vllm-ascend
             and vLLM, --init-expert-location for SGLang, moe_load_balancer for TensorRT-LLM)
    """
    from eplb_platform.cli.validation import check

    outcome = check(map_file, ranks=ranks, experts=experts, layers=layers, format=format)
    if as_json:
        typer.echo(json.dumps(outcome.as_dict()))
    else:
        for line in outcome.lines():
            typer.echo(line, err=not outcome.valid)
    return 0 if outcome.valid else BAD_INPUT


@application.command()
def plan(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Recorded load, of any engine.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="MAP",
            help="The map: .json (vllm-ascend, vLLM), .yaml (TensorRT-LLM), .pt (SGLang).",
        ),
    ],
    ep_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_RANKS, help="The number of ranks.", show_default="that of --current"),
    ] = None,
    num_slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_SLOTS,
            help="Physical experts of all ranks: experts + redundant ones, a multiple of --ep-size.",
            show_default="those of --current",
        ),
    ] = None,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes that the ranks stand on.")] = 1,
    num_expert_groups: ExpertGroups = 1,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="The algorithm that plans.",
            show_default="the library's default; compute_aware with --compute-cost",
        ),
    ] = None,
    current: Annotated[
        Path | None, typer.Option(metavar="MAP", help="The map in use: plan few moves away from it.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the algorithm; repeatable.")
    ] = None,
    compute_cost: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Time of one token in each expert, [layers, experts] (.json, .npy, .safetensors), "
            "as measured while serving (compute_cost_record_path): plan by time.",
        ),
    ] = None,
    phase: Annotated[
        Literal["all", "prefill", "decode"], typer.Option(help="The steps that count; mixed ones always do.")
    ] = "all",
    windows: Annotated[
        int, typer.Option(min=1, help="Windows that the steps are summed into, in order.")
    ] = 16,
    iter_range: IterRange = None,
    survive: Annotated[
        Literal["none", "rank", "node"],
        typer.Option(help="Every expert keeps a replica after the loss of any one; prints what it costs."),
    ] = "none",
    as_json: AsJson = False,
) -> None:
    """Plan an expert map from recorded load.

    Prints the balancedness of each layer before and after, the most that any map could have, and the experts
    that a rank must newly receive; without --current, against the layout that engines start with.

    \b
    Example: eplb plan dump.pt --ep-size 16 --num-slots 272 -o map.json
             272 slots are 256 experts and 16 redundant ones, 17 on each rank
    Next:    eplb report later.pt --map map.json, on load that was not planned on
    """
    from eplb_platform.cli.planning import Request, make_plan

    outcome = make_plan(
        Request(
            traces=traces,
            output=output,
            ep_size=ep_size,
            num_slots=num_slots,
            num_nodes=num_nodes,
            num_expert_groups=num_expert_groups,
            algorithm=algorithm,
            current=current,
            options=option or (),
            phase=phase,
            num_windows=windows,
            compute_cost=compute_cost,
            iter_range=iter_range,
            survive=survive,
        )
    )
    show_lines(outcome, as_json)


@application.command()
def report(
    trace: Trace,
    ep_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_RANKS,
            help="The number of ranks: of maps that do not say it, and of the run if its record does not.",
        ),
    ] = None,
    iter_range: IterRange = None,
    map_: Annotated[
        list[Path] | None,
        typer.Option("--map", metavar="MAP", help="Project the load under this map; repeatable."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Write one page that opens offline (.html).")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PICTURE", help="Write a picture (.png).")] = None,
    as_json: AsJson = False,
) -> None:
    """Report how unbalanced recorded load is.

    In the layout that engines start with, and under any number of maps. Per layer: mean, standard deviation
    and imbalance ratio of the rank loads, balancedness, hottest experts, drift over time; phases apart.

    \b
    Who records load, and how:
      SGLang        --expert-distribution-recorder-mode stat, then POST
                    /start_expert_distribution_record, /stop_..., /dump_...
      TensorRT-LLM  EXPERT_STATISTIC_PATH=FOLDER EXPERT_STATISTIC_ITER_RANGE=A-B
      vLLM          with this plugin: trace_record_path in eplb_config

    \b
    Example: eplb report dump.pt --ep-size 16 --map map.json --html report.html
    Next:    eplb advise dump.pt, or eplb plan dump.pt for a map
    """
    from eplb_platform.cli.reporting import Request, make

    outcome = make(Request(trace, ep_size, iter_range, map_ or (), html, plot))
    show_lines(outcome, as_json)


@application.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A map or recorded load: a file, or a folder of them.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            help="A map: .json (vllm-ascend), .yaml (TensorRT-LLM), .pt (SGLang). Recorded load: "
            ".safetensors (trace), .pt or .json (SGLang), no suffix (TensorRT-LLM's folder).",
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Maps: vllm-ascend, tensorrt-llm, sglang, vllm. Recorded load: trace, tensorrt-llm, sglang.",
            show_default="what OUTPUT says",
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="FORMAT", help="As --to.", show_default="what INPUT looks like"),
    ] = None,
    ep_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_RANKS, help="The number of ranks, which only vllm-ascend's maps say."),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Logical experts in a layer.", show_default="the largest id + 1")
    ] = None,
    first_moe_layer: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST_DENSE_LAYERS, help="Dense layers before the first with experts (DeepSeek-V3: 3)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert maps and recorded load between engines.

    vllm-ascend and vLLM hold MoE layers only; TensorRT-LLM numbers them as in the model; SGLang has a row for
    every layer, dense ones too.

    \b
    Example: eplb convert location.pt --ep-size 16 --first-moe-layer 3 -o map.json
             (DeepSeek's map of SGLang, with rows for 3 dense layers, for vllm-ascend)
    Next:    eplb validate map.json --ep-size 16
    """
    from eplb_platform.cli.converting import Request
    from eplb_platform.cli.converting import convert as do

    outcome = do(Request(source, output, from_, to, ep_size, experts, first_moe_layer))
    show_lines(outcome, as_json)


@application.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="MAP", help="An expert map, of any engine.")],
    second: Annotated[Path, typer.Argument(metavar="MAP", help="The map to compare it with.")],
    trace: Trace,
    ep_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_RANKS, help="The number of ranks, for maps that do not say it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two expert maps under the same load.

    Layer by layer: imbalance ratio, balancedness, and the experts that ranks must receive to go from the
    first to the second.

    \b
    Example: eplb compare old.json map.json later.pt
    Next:    eplb validate map.json, and deploy it
    """
    from eplb_platform.cli.comparing import compare as do

    outcome = do(first, second, trace, ep_size)
    show_lines(outcome, as_json)


@application.command()
def simulate(
    trace: Trace,
    algorithm: Annotated[
        str, typer.Option(metavar="NAME,...", help="Algorithms, each beside no balancing and a static map.")
    ] = "adaptive",
    ep_size: EpSize = None,
    num_nodes: NumNodes = None,
    redundant_experts: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_SLOTS,
            help="Slots beyond one for each expert, of all ranks.",
            show_default="the fewest that ranks can share evenly",
        ),
    ] = None,
    num_expert_groups: ExpertGroups = 1,
    hardware: Hardware = "h100",
    model: ModelOption = None,
    map_: Annotated[
        list[Path] | None,
        typer.Option("--map", metavar="MAP", help="A map that is served beside, unchanged; repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A key of eplb_config, as expert_heat_collection_interval=300 or staging_memory_mb=500; "
            "repeatable.",
        ),
    ] = None,
    planning_time: Annotated[
        float, typer.Option(min=0, metavar="S", help="Simulated seconds that a plan takes.")
    ] = 0.5,
    iter_range: IterRange = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="Write the steps over time as a picture (.png).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded load through the balancer.

    The balancer is the one that serves; time is simulated.

    For each algorithm: balancedness of every forward pass on load that its map had not seen, experts and
    bytes moved, waits, and an estimate of step time and throughput on the given hardware.

    \b
    Example: eplb simulate dump.pt --ep-size 32 --redundant-experts 32 --algorithm adaptive,deepseek
    Next:    eplb advise dump.pt, which searches for the numbers that are given here
    """
    from eplb_platform.cli.estimating import Deployment
    from eplb_platform.cli.simulating import Request, run

    request = Request(
        trace=trace,
        algorithms=names(algorithm),
        deployment=Deployment(hardware, model or (), ep_size, num_nodes, num_expert_groups),
        redundant_experts=redundant_experts,
        maps=map_ or (),
        iter_range=iter_range,
        planning_time_s=planning_time,
        settings=set_ or (),
        plot=plot,
    )
    with progress() as advance:
        outcome = run(request, lambda done, total: advance("steps", done, total))
    show_tables(outcome, as_json)


@application.command()
def advise(
    trace: Trace,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="GB",
            help="Memory of a rank for experts, staging included.",
            show_default="60 % of the hardware's",
        ),
    ] = None,
    ep_size: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Numbers of ranks to choose from.",
            show_default="the smallest four powers of two that the experts fit on",
        ),
    ] = None,
    hardware: Hardware = "h100",
    model: ModelOption = None,
    num_expert_groups: ExpertGroups = 1,
    algorithm: Annotated[str, typer.Option(help="The algorithm that plans.")] = "adaptive",
    objective: Annotated[
        Literal["throughput", "latency"],
        typer.Option(help="Most tokens/s of a rank, or the shortest step."),
    ] = "throughput",
    iter_range: IterRange = None,
    as_json: AsJson = False,
) -> None:
    """Advise what to deploy for recorded load, and why.

    With what is to be pasted: EP size, redundant experts, hierarchical or global placement, a static map or
    balancing while serving and how often. Planned on the first half of the steps, judged on the second.

    \b
    Example: eplb advise dump.pt --memory 48 --ep-size 16,32 --hardware h100
    Next:    the commands that it prints, or eplb simulate for the chosen numbers in detail
    """
    from eplb_platform.cli.advising import Request, run
    from eplb_platform.cli.estimating import Deployment

    deployment = Deployment(hardware, model or (), num_expert_groups=num_expert_groups)
    request = Request(trace, memory, names(ep_size), deployment, algorithm, objective, iter_range)
    with progress() as advance:
        outcome = run(request, advance)
    show_tables(outcome, as_json)


@application.command()
def bench(
    traces: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[TRACE]...", help="Load traces (.safetensors, .partial), one after the other."
        ),
    ] = None,
    load: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Seeded loads: zipf, lognormal, grouped, drifting, switching.",
            show_default="all, but with traces none",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPERTSxSLOTSxRANKS[xNODES[xGROUPS]]",
            help="What is planned for; repeatable.",
            show_default="five from 64x64x8 to 256x288x32x4x8",
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Algorithms.", show_default="all that plan by tokens"),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the seeded loads.")] = 4,
    collections: Annotated[int, typer.Option(min=1, help="Balancing cycles of the seeded loads.")] = 6,
    forwards: Annotated[int, typer.Option(min=1, help="Forward passes that a plan is made from.")] = 40,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows that these forward passes are summed into, at most.")
    ] = 40,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a forward pass, each for 8 experts, of the sampled loads.")
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Draws the loads.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure planning algorithms beside other engines' planners.

    Each plans on one collection of load after the other and is judged on the next one, which it has not seen.
    """
    from rich.console import Console

    from eplb_platform.cli.benching import Request
    from eplb_platform.cli.benching import bench as measure

    request = Request(
        traces=traces or (),
        loads=names(load),
        shapes=shape or (),
        algorithms=names(algorithm),
        num_layers=layers,
        num_collections=collections,
        num_forwards=forwards,
        num_windows=windows,
        tokens_per_forward=tokens,
        seed=seed,
    )
    with progress() as advance:
        outcome = measure(request, advance)
    if as_json:
        typer.echo(json.dumps(outcome.as_dicts()))
    else:
        outcome.print(Console())


@application.command()
def demo(
    ranks: Annotated[int, typer.Option(help="Processes that serve the model together.")] = 4,
    redundant_experts: Annotated[
        int | None,
        typer.Option(help="Slots beyond one for each expert.", show_default="about a quarter of the experts"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A Qwen3-MoE checkpoint folder with a byte vocabulary.", show_default="the shipped one"
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text to serve; repeat it to mix several.", show_default="the shipped ones"),
    ] = None,
    backend: Annotated[str, typer.Option(help="The backend that moves experts.")] = "auto",
    seed: Annotated[int, typer.Option(help="Draws the prompts.")] = 0,
    expert_map_record_path: Annotated[
        Path | None,
        typer.Option(help="Where phase `record` writes its map.", show_default="eplb-demo/expert_map.json"),
    ] = None,
    expert_map_path: Annotated[
        Path | None, typer.Option(help="The map of phase `static`.", show_default="the recorded one")
    ] = None,
    heat_interval: Annotated[
        int | None, typer.Option(help="Forward passes whose load a plan is made from.", show_default="48")
    ] = None,
    plan_interval: Annotated[
        int | None, typer.Option(help="Forward passes a plan may take.", show_default="8")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Forward passes of a phase.", show_default="480")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes (PNG).", show_default="eplb-demo/load.png")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few forward passes: shows that it works, not how well.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Watch a model being balanced while it serves.

    A small mixture-of-experts model is served by several processes, without balancing and with it.

    Exit code 1 when balancing changed a token or did not raise balancedness.
    """
    from eplb_platform.cli.demonstration import demonstrate

    given = {
        "ranks": ranks,
        "redundant_experts": redundant_experts,
        "model": model,
        "texts": tuple(text) if text else None,
        "backend": backend,
        "seed": seed,
        "expert_map_record_path": expert_map_record_path,
        "expert_map_path": expert_map_path,
        "heat_interval": heat_interval,
        "plan_interval": plan_interval,
        "steps": steps,
        "picture": picture,
    }
    return demonstrate({name: value for name, value in given.items() if value is not None}, quick, as_json)
