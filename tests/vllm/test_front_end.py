"""`eplb_config` in the front end of the real vLLM: the flags that it sets, and the line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

arg_utils = pytest.importorskip("vllm.engine.arg_utils")

from vllm.usage.usage_lib import UsageContext  # noqa: E402

from eplb_platform import ExpertMap, Topology  # noqa: E402
from eplb_platform.config import ConfigError, EplbConfig  # noqa: E402
from eplb_platform.integrations.vllm import configuration  # noqa: E402
from eplb_platform.integrations.vllm.device_platform import DevicePlatform  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "eplb_platform" / "demo" / "checkpoint"
EXPERTS, LAYERS = 64, 4
START_S = 600.0


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("DYNAMIC_EPLB", "EXPERT_MAP_RECORD", "VLLM_DP_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.pop(configuration.HANDED_OVER, None)


def arguments(additional_config: object, **options: Any) -> Any:
    """EngineArgs for the demo's checkpoint on two ranks."""
    given = {
        "model": str(CHECKPOINT),
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
    }
    return arg_utils.EngineArgs(**{**given, **options}, additional_config=additional_config)


def refusal(keys: dict[str, object], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        arguments({"eplb_config": keys}, **options).create_engine_config(UsageContext.LLM_CLASS)
    message = str(caught.value)
    assert "\n" not in message
    return message


def saved(tmp_path: Path, *, layers: int = LAYERS, experts: int = EXPERTS, ranks: int = 2) -> str:
    """A map with two redundant experts."""
    path = tmp_path / f"map-{layers}-{experts}-{ranks}.json"
    ExpertMap.round_robin(layers, experts, Topology(ranks), 2).save(path)
    return str(path)


# --- what vLLM builds ---


def test_flags_are_set_while_vllm_builds_and_restored() -> None:
    additional_config = {"eplb_config": {"dynamic_eplb": True, "num_redundant_experts": 2}}
    engine_args = arguments(additional_config)
    native = engine_args.eplb_config
    for _ in range(2):  # the same arguments may be used again
        built = engine_args.create_engine_config()
        parallel = built.parallel_config
        assert parallel.enable_eplb
        assert parallel.eplb_config.num_redundant_experts == 2
        assert not parallel.eplb_config.use_async
        assert built.additional_config == json.loads(json.dumps(additional_config))
        assert configuration.of_worker(built) == EplbConfig(dynamic_eplb=True, num_redundant_experts=2)
        assert engine_args.eplb_config is native
        assert not engine_args.enable_eplb
        assert engine_args.additional_config is additional_config


def test_flags_are_restored_when_vllm_refuses() -> None:
    engine_args = arguments({"eplb_config": {"dynamic_eplb": True}}, model="/no/such/model")
    with pytest.raises(Exception, match="/no/such/model"):
        engine_args.create_engine_config()
    assert not engine_args.enable_eplb


def test_vllm_is_left_alone_without_a_request() -> None:
    native = arguments({}).create_engine_config()
    for additional_config in ({"eplb_config": {}}, {"eplb_config": {"dynamic_eplb": False}}):
        built = arguments(additional_config).create_engine_config()
        assert built.parallel_config.eplb_config == native.parallel_config.eplb_config
        assert not built.parallel_config.enable_eplb
        assert configuration.of_worker(built) is None


def test_redundancy_comes_from_the_map(tmp_path: Path) -> None:
    built = arguments({"eplb_config": {"expert_map_path": saved(tmp_path)}}).create_engine_config()
    assert built.parallel_config.eplb_config.num_redundant_experts == 2


def test_map_covers_all_pipeline_stages(tmp_path: Path) -> None:
    arguments(
        {"eplb_config": {"expert_map_path": saved(tmp_path)}}, pipeline_parallel_size=2
    ).create_engine_config()
    half = saved(tmp_path, layers=LAYERS // 2)
    assert "model has 4 MoE layers" in refusal({"expert_map_path": half}, pipeline_parallel_size=2)


def test_keys_travel_apart_for_ascends_second_runner() -> None:
    """vllm-ascend's check sees no key of ours, and neither does the hash of the configuration."""
    ascend = DevicePlatform("npu", uses_v2_runner=True)
    engine_args = arguments({"eplb_config": {"dynamic_eplb": True}, "refresh": True})
    serving = configuration.ServingConfig(EplbConfig(dynamic_eplb=True), 0)
    with configuration.applied(engine_args, serving, ascend):
        assert engine_args.additional_config == {"refresh": True}
        assert engine_args.eplb_config.communicator == "torch_nccl"
        assert not engine_args.eplb_config.use_async
    assert engine_args.additional_config == {"eplb_config": {"dynamic_eplb": True}, "refresh": True}
    assert json.loads(os.environ[configuration.HANDED_OVER]) == {"dynamic_eplb": True}


# --- what is refused ---


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        ({"dynamic_eplb": "yes"}, {}, "eplb_config.dynamic_eplb: 'yes', expected true or false"),
        ({"dynamic_elpb": True}, {}, "unknown key, did you mean 'dynamic_eplb'?"),
        ({"num_redundant_experts": 3}, {}, "3 redundant ones cannot be shared evenly by 2 ranks"),
        ({"num_redundant_experts": 3}, {}, "the nearest that can: 2 or 4"),
        ({}, {"enable_expert_parallel": False}, "add --enable-expert-parallel"),
        ({}, {"tensor_parallel_size": 1}, "the EP size is 1"),
        ({}, {"enable_eplb": True}, "leave --enable-eplb out, or eplb_config"),
        ({}, {"eplb_config": {"step_interval": 5}}, "leave --eplb-config out, or eplb_config"),
        ({}, {"enable_elastic_ep": True}, "--enable-elastic-ep"),
        ({"backend": "cuda_of_tomorrow"}, {}, "'cuda_of_tomorrow' is not installed"),
        ({"eplb_policy_type": "random_"}, {}, "no algorithm 'random_'"),
        ({"expert_map_record_path": "/no/folder/map.json"}, {}, "the folder '/no/folder' does not exist"),
        ({"expert_map_path": "/no/folder/map.json"}, {}, "/no/folder/map.json: No such file"),
    ],
)
def test_misconfiguration(keys: dict[str, object], options: dict[str, Any], words: str) -> None:
    assert words in refusal({"dynamic_eplb": True, **keys}, **options)


def test_map_of_other_ranks(tmp_path: Path) -> None:
    message = refusal({"expert_map_path": saved(tmp_path, experts=62, ranks=4)})
    assert "for 4 ranks, but the EP size of this engine is 2" in message
    assert "`eplb plan --ep-size 2`" in message


def test_map_of_another_model(tmp_path: Path) -> None:
    experts = refusal({"expert_map_path": saved(tmp_path, experts=32)})
    assert "32 logical experts, but the model has 64" in experts
    layers = refusal({"expert_map_path": saved(tmp_path, layers=5)})
    assert "5 layers, but the model has 4 MoE layers" in layers


def test_half_written_map(tmp_path: Path) -> None:
    path = Path(saved(tmp_path))
    path.write_bytes(path.read_bytes()[:200])
    assert f"{path}: line " in refusal({"expert_map_path": str(path)})


def test_dense_model(tmp_path: Path) -> None:
    document = json.loads((CHECKPOINT / "config.json").read_text())
    mixture = {key for key in document if "expert" in key or "moe" in key or "router" in key}
    dense = {key: value for key, value in document.items() if key not in mixture}
    dense |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    assert "has no experts to balance" in refusal({"dynamic_eplb": True}, model=str(tmp_path))


def test_unknown_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import ModelConfig

    monkeypatch.delattr(ModelConfig, "get_num_experts")
    assert "it lacks vllm.config:ModelConfig.get_num_experts" in refusal({"dynamic_eplb": True})


def test_llm_raises_the_same() -> None:
    from vllm import LLM

    with pytest.raises(ConfigError, match="add --enable-expert-parallel"):
        LLM(
            str(CHECKPOINT),
            tensor_parallel_size=2,
            skip_tokenizer_init=True,
            additional_config={"eplb_config": {"dynamic_eplb": True}},
        )


# --- real servers ---


def end_of_server(tmp_path: Path, module: str, *options: str) -> tuple[int, list[str]]:
    """The exit code and the lines on standard error of a server that must end by itself."""
    # Without a distribution named vllm, as in the CPU build, the command refuses to start.
    shim = tmp_path / "vllm-0.32.0+cpu.dist-info"
    shim.mkdir()
    (shim / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *options, "--skip-tokenizer-init"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=START_S,
    )
    return done.returncode, done.stderr.splitlines()


TWO_RANKS = ["--tensor-parallel-size", "2", "--enable-expert-parallel"]


@pytest.mark.parametrize(
    ("module", "options", "request_", "words"),
    [
        (
            "vllm.entrypoints.openai.api_server",
            ["--model", str(CHECKPOINT), "--port", "0", *TWO_RANKS, "--additional-config"],
            '{"eplb_config": {"dynamic_eplb": 1}}',
            "eplb_config.dynamic_eplb: 1, expected true or false",
        ),
        (
            "vllm.entrypoints.cli.main",
            ["serve", str(CHECKPOINT), "--headless", "--data-parallel-size", "2", "--enable-expert-parallel"],
            "--additional-config.eplb_config.expert_map_path=/no/map.json",
            "/no/map.json: No such file or directory",
        ),
        (
            "vllm.entrypoints.cli.main",
            ["serve", str(CHECKPOINT), "--port", "0", "--api-server-count", "2", *TWO_RANKS],
            '--additional-config={"eplb_config": {"dynamic_eplb": true, "num_redundant_experts": 3}}',
            "the nearest that can: 2 or 4",
        ),
    ],
    ids=["api_server", "serve --headless", "serve with two API servers"],
)
def test_server_ends_with_one_line(
    tmp_path: Path, module: str, options: list[str], request_: str, words: str
) -> None:
    code, lines = end_of_server(tmp_path, module, *options, request_)
    assert code == 2, "\n".join(lines)
    ours = [line for line in lines if "eplb_platform:" in line]
    assert len(ours) == 1
    assert ours[0].startswith("eplb_platform: ")
    assert words in ours[0]
    assert not any("Traceback" in line for line in lines)
