"""What the front end of vLLM does with `eplb_config`, as far as it can be seen without vLLM."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eplb_platform import ExpertMap, Topology
from eplb_platform.config import ConfigError
from eplb_platform.integrations.vllm import configuration, deployed_map
from eplb_platform.integrations.vllm.device_platform import DevicePlatform
from eplb_platform.integrations.vllm.model_layers import moe_layers

CPU = DevicePlatform("cpu")
ASCEND = DevicePlatform("npu", uses_v2_runner=False)
ASCEND_V2 = DevicePlatform("npu", uses_v2_runner=True)


@dataclass
class NativeConfig:
    """Stands for vLLM's EPLBConfig."""

    window_size: int = 1000
    num_redundant_experts: int = 0


@dataclass
class Arguments:
    """Stands for vLLM's EngineArgs: two ranks unless said."""

    additional_config: Any
    tensor_parallel_size: int = 2
    prefill_context_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = True
    enable_eplb: bool = False
    eplb_config: NativeConfig = field(default_factory=NativeConfig)
    enable_elastic_ep: bool = False
    node_rank: int = 0


def ask(arguments: Arguments | dict[str, object], platform: DevicePlatform = CPU) -> Any:
    """What is requested by these arguments, or by these keys of `eplb_config`."""
    if isinstance(arguments, dict):
        arguments = Arguments({"eplb_config": arguments})
    return configuration.requested(arguments, platform)  # type: ignore[arg-type]  # a stand-in


def refusal(arguments: Arguments | dict[str, object], platform: DevicePlatform = CPU) -> str:
    with pytest.raises(ConfigError) as caught:
        ask(arguments, platform)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DYNAMIC_EPLB", "EXPERT_MAP_RECORD", "VLLM_DP_SIZE", configuration.HANDED_OVER):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def map_file(tmp_path: Path) -> str:
    """Eight experts and two redundant ones in three layers on two ranks."""
    path = tmp_path / "map.json"
    ExpertMap.initial(3, 8, Topology(2), num_redundant_experts=2).save(path)
    return str(path)


# --- nothing to do ---


@pytest.mark.parametrize(
    "additional_config",
    [{}, None, object(), {"other": 1}, {"eplb_config": {}}, {"eplb_config": {"dynamic_eplb": False}}],
    ids=repr,
)
def test_nothing_asked_for_is_silent(additional_config: object, caplog: pytest.LogCaptureFixture) -> None:
    arguments = Arguments(additional_config, tensor_parallel_size=1, enable_expert_parallel=False)
    assert ask(arguments) is None
    assert not caplog.records


def test_environment_alone_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMIC_EPLB", "true")
    assert ask(Arguments({"other": 1})) is None
    assert ask({}).eplb.dynamic_eplb


def test_keys_that_ask_for_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    assert ask({"num_redundant_experts": 4, "dynamic_eplb": False}) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "num_redundant_experts" in caplog.text


# --- what is requested ---


def test_request() -> None:
    serving = ask({"dynamic_eplb": True, "num_redundant_experts": 6})
    assert (serving.num_redundant_experts, serving.expert_map) == (6, None)
    assert serving.eplb.moves_experts


def test_old_flat_names_work_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    given = {"dynamic_eplb": True, "num_iterations_eplb_update": 7, "init_redundancy_expert": 2}
    serving = ask(Arguments(given))
    assert serving.eplb.expert_heat_collection_interval == 7
    assert serving.num_redundant_experts == 2
    assert len(caplog.records) == 3
    assert "num_iterations_eplb_update is deprecated" in caplog.text


def test_redundancy_comes_from_the_map(map_file: str) -> None:
    serving = ask({"expert_map_path": map_file})
    assert serving.num_redundant_experts == 2
    assert serving.expert_map == ExpertMap.load(map_file)
    assert ask({"expert_map_path": map_file, "num_redundant_experts": 2}).num_redundant_experts == 2


def test_map_may_be_recorded_where_it_was_read(map_file: str) -> None:
    assert ask({"expert_map_path": map_file, "expert_map_record_path": map_file, "dynamic_eplb": True})


def test_checks_leave_nothing_behind(tmp_path: Path) -> None:
    paths = {
        "expert_map_record_path": str(tmp_path / "map.json"),
        "trace_record_path": str(tmp_path / "trace.safetensors"),
    }
    assert ask(paths)
    assert list(tmp_path.iterdir()) == []


def test_data_parallel_ranks_count_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    assert ask(Arguments({"eplb_config": {"dynamic_eplb": True}}, tensor_parallel_size=1))


def test_second_node_need_not_be_able_to_write() -> None:
    given = {"eplb_config": {"dynamic_eplb": True, "expert_map_record_path": "/no/such/folder/map.json"}}
    assert "does not exist" in refusal(Arguments(given))
    assert ask(Arguments(given, node_rank=1))


# --- what is refused ---


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dynamic_eplb": 1}, ["dynamic_eplb: 1", "true or false"]),
        ({"dynamic_elpb": True}, ["unknown key", "'dynamic_eplb'"]),
        ({"dynamic_eplb": True, "num_redundant_experts": -1}, ["num_redundant_experts: -1", "at least 0"]),
        ({"dynamic_eplb": True, "num_redundant_experts": 1024}, ["num_redundant_experts: 1024", "1023"]),
        ({"dynamic_eplb": True, "eplb_policy_type": "adaptiv"}, ["eplb_policy_type", "'adaptive'"]),
        ({"dynamic_eplb": True, "backend": "cqu"}, ["backend: 'cqu'", "(installed: ", "cpu for cpu: ready"]),
        ({"expert_map_path": "/no/map.json"}, ["/no/map.json", "No such file"]),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_bad_values(keys: dict[str, object], words: list[str]) -> None:
    message = refusal(keys)
    assert [word for word in words if word not in message] == []


def test_misspelt_section() -> None:
    assert "'eplb_config'" in refusal(Arguments({"eplb_confg": {"dynamic_eplb": True}}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enable_expert_parallel": False}, ["--enable-expert-parallel"]),
        ({"tensor_parallel_size": 1}, ["EP size is 1", "--tensor-parallel-size"]),
        ({"enable_eplb": True}, ["--enable-eplb", "vLLM's own balancer", "leave --enable-eplb out"]),
        ({"eplb_config": NativeConfig(window_size=5)}, ["--eplb-config", "leave --eplb-config out"]),
        ({"enable_elastic_ep": True}, ["--enable-elastic-ep"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_flags_that_do_not_go_together(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(Arguments({"eplb_config": {"dynamic_eplb": True}}, **changes))
    assert [word for word in words if word not in message] == []


def test_flags_are_vllms_own_business_without_a_request() -> None:
    assert ask(Arguments({}, enable_eplb=True)) is None


def test_backend_for_other_devices() -> None:
    keys: dict[str, object] = {"dynamic_eplb": True}
    assert "none is usable for 'xpu'" in refusal(keys, DevicePlatform("xpu"))
    message = refusal({**keys, "backend": "cpu"}, DevicePlatform("xpu"))
    assert "'cpu' is for 'cpu', but vLLM runs on 'xpu'" in message


def test_map_for_other_ranks(map_file: str) -> None:
    given = {"eplb_config": {"expert_map_path": map_file}}
    message = refusal(Arguments(given, data_parallel_size=2))
    assert "2 ranks" in message
    assert "EP size of this engine is 4" in message
    assert "eplb plan --ep-size 4" in message


def test_map_of_other_redundancy(map_file: str) -> None:
    for configured in (0, 4):
        message = refusal({"expert_map_path": map_file, "num_redundant_experts": configured})
        assert f"num_redundant_experts: {configured}" in message
        assert "has 2 redundant experts" in message


def test_half_written_map(map_file: str) -> None:
    whole = Path(map_file).read_bytes()
    Path(map_file).write_bytes(whole[: len(whole) // 2])
    message = refusal({"expert_map_path": map_file})
    assert message.startswith(f"{map_file}: line ")
    assert "no valid JSON" in message


def test_invalid_map(map_file: str) -> None:
    document = json.loads(Path(map_file).read_text())
    document["layer_list"][1]["device_list"][0]["device_expert"][0] = 99
    Path(map_file).write_text(json.dumps(document))
    assert "layer_list[1].device_list[0].device_expert[0]: 99" in refusal({"expert_map_path": map_file})


@pytest.mark.parametrize("key", ["expert_map_record_path", "trace_record_path"])
def test_paths_that_cannot_be_written(key: str, tmp_path: Path) -> None:
    suffix = ".json" if key == "expert_map_record_path" else ".safetensors"

    def refused(path: Path) -> str:
        message = refusal({"dynamic_eplb": True, key: str(path)})
        assert f"{key}: '{path}'" in message
        return message

    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert "is a folder" in refused(folder)
    assert f"the folder '{tmp_path / 'missing'}' does not exist" in refused(
        tmp_path / "missing" / f"a{suffix}"
    )
    assert "is not a folder" in refused(ordinary / f"a{suffix}")
    assert "cannot be written" in refused(tmp_path / ("long" * 100 + suffix))
    if sys.platform == "linux":  # where even a superuser cannot make a file
        assert "cannot be written" in refused(Path(f"/proc/a{suffix}"))


def test_trace_over_a_map(map_file: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    trace.symlink_to(map_file)
    for key in ("expert_map_path", "expert_map_record_path"):
        message = refusal({key: map_file, "trace_record_path": str(trace)})
        assert f"is the same file as eplb_config.{key}" in message


# --- what only the model tells ---


def built(num_experts: int, ep_size: int = 2, **text_config: object) -> Any:
    """Stands for vLLM's VllmConfig."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="a-model",
            get_num_experts=lambda: num_experts,
            hf_text_config=SimpleNamespace(**text_config),
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=ep_size, prefill_context_parallel_size=1, data_parallel_size=1
        ),
    )


def refusal_of_built(vllm_config: Any, serving: configuration.ServingConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        configuration.check_built(vllm_config, serving)
    return str(caught.value)


@pytest.mark.parametrize(
    ("redundant", "ep_size", "nearest"), [(3, 2, "2 or 4"), (0, 3, "2"), (5, 4, "4 or 8"), (1023, 5, "1021")]
)
def test_redundancy_that_does_not_divide(redundant: int, ep_size: int, nearest: str) -> None:
    keys: dict[str, object] = {"dynamic_eplb": True, "num_redundant_experts": redundant}
    message = refusal_of_built(built(64, ep_size), ask(keys))
    assert message.startswith(f"eplb_config.num_redundant_experts: {redundant}, ")
    assert message.endswith(f"{ep_size} ranks, the nearest that can: {nearest}")


def test_redundancy_that_divides() -> None:
    configuration.check_built(built(64), ask({"dynamic_eplb": True, "num_redundant_experts": 4}))


def test_dense_model() -> None:
    message = refusal_of_built(built(0), ask({"dynamic_eplb": True}))
    assert "the model 'a-model' has no experts" in message


def test_map_of_another_model(map_file: str) -> None:
    serving = ask({"expert_map_path": map_file})
    assert "8 logical experts, but the model has 16" in refusal_of_built(built(16), serving)
    qwen = {"model_type": "qwen3_moe", "num_hidden_layers": 4}
    assert "3 layers, but the model has 4 MoE layers" in refusal_of_built(built(8, **qwen), serving)
    configuration.check_built(built(8, **{**qwen, "mlp_only_layers": [0]}), serving)
    configuration.check_built(built(8, model_type="unheard_of", num_hidden_layers=9), serving)


def test_map_when_vllm_changed_the_ranks(map_file: str) -> None:
    assert "EP size of this engine is 4" in refusal_of_built(built(8, 4), ask({"expert_map_path": map_file}))


# --- parts of a map ---


def test_part_of_map() -> None:
    table = np.array([[0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0]])
    whole = ExpertMap(table, 4, Topology(2))
    part = deployed_map.part_of_map(whole, first_layer=1, num_layers=2, total_layers=3)
    assert part == ExpertMap(table[1:], 4, Topology(2))
    assert deployed_map.part_of_map(whole, first_layer=0, num_layers=3, total_layers=3) == whole
    with pytest.raises(ConfigError, match="a map of 3 layers, but the model has 5 MoE layers"):
        deployed_map.part_of_map(whole, first_layer=0, num_layers=3, total_layers=5)
    with pytest.raises(ValueError, match="layers 2 to 3 in a model of 3"):
        deployed_map.part_of_map(whole, first_layer=2, num_layers=2, total_layers=3)


def test_part_fits_the_stage() -> None:
    topology = Topology(2)
    whole = ExpertMap.round_robin(3, 8, topology, 2)
    deployed_map.check_fits(whole, ExpertMap.initial(3, 8, topology, 2), "map.json")
    for other, words in (
        (ExpertMap.initial(2, 8, topology, 2), "3 layers, but the model has 2"),
        (ExpertMap.initial(3, 6, topology, 4), "8 logical experts, but the model has 6"),
        (ExpertMap.initial(3, 8, topology, 4), "10 physical experts, but the engine made room for 12"),
        (ExpertMap.initial(3, 8, Topology(5), 2), "EP size of this engine is 5"),
    ):
        with pytest.raises(ConfigError, match=words):
            deployed_map.check_fits(whole, other, "map.json")


# --- the MoE layers of model families ---


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"model_type": "mixtral"}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "gpt_oss"}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": [5]}, (0, 1, 2, 3, 4)),
        ({"model_type": "qwen2_moe", "decoder_sparse_step": 2}, (1, 3, 5)),
        ({"model_type": "qwen3_vl_moe_text", "mlp_only_layers": None}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 3}, (3, 4, 5)),
        ({"model_type": "deepseek_v2", "first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"model_type": "kimi_linear", "first_k_dense_replace": 1, "moe_layer_freq": 1}, (1, 2, 3, 4, 5)),
        ({"model_type": "glm4_moe", "first_k_dense_replace": 1, "moe_layer_freq": 2}, (1, 2, 3, 4, 5)),
        ({"model_type": "ernie4_5_moe", "moe_layer_start_index": 1, "moe_layer_interval": 2}, (1, 3, 5)),
        ({"model_type": "ernie4_5_moe", "moe_layer_end_index": 2}, (0, 1, 2)),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 2}, (1, 3, 5)),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 0}, ()),
        ({"model_type": "mimo_v2_flash", "moe_layer_freq": [0, 1, 1, 1, 0, 1]}, (1, 2, 3, 5)),
        ({"model_type": "lfm2_moe", "num_dense_layers": 2}, (2, 3, 4, 5)),
        ({"model_type": "unheard_of"}, None),
        ({"model_type": "deepseek_v3"}, None),
        ({"model_type": "mimo_v2_flash", "moe_layer_freq": [1]}, None),
        ({"model_type": "mixtral", "num_hidden_layers": None}, None),
    ],
    ids=lambda value: str(value["model_type"]) if isinstance(value, dict) else "",
)
def test_moe_layers(fields: dict[str, object], layers: tuple[int, ...] | None) -> None:
    assert moe_layers(SimpleNamespace(**{"num_hidden_layers": 6, **fields})) == layers


# --- workers ---


def worker_config(additional_config: object, *, enable_eplb: bool = True, window_size: int = 1) -> Any:
    return SimpleNamespace(
        additional_config=additional_config,
        parallel_config=SimpleNamespace(
            enable_eplb=enable_eplb, eplb_config=SimpleNamespace(window_size=window_size)
        ),
    )


def test_worker_reads_the_same_keys(recwarn: pytest.WarningsRecorder) -> None:
    given = {"dynamic_eplb": True, "eplb_config": {"load_windows": 3}}
    config = configuration.of_worker(worker_config(given))
    assert config is not None
    assert (config.dynamic_eplb, config.load_windows) == (True, 3)
    assert not recwarn.list


def test_worker_leaves_vllms_own_balancer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"eplb_config": {"dynamic_eplb": True}}
    assert configuration.of_worker(worker_config(given, enable_eplb=False)) is None
    monkeypatch.setenv(configuration.HANDED_OVER, '{"dynamic_eplb": true}')
    assert configuration.of_worker(worker_config({}, window_size=1000)) is None


# --- Ascend ---


def test_ascends_first_runner_balances_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    # A key of vllm-ascend's own is no error: it reads them itself.
    assert ask({"dynamic_eplb": True, "unheard_of": 1}, ASCEND) is None
    (record,) = caplog.records
    assert "steps aside" in record.getMessage()
    caplog.clear()
    assert ask(Arguments({"other": 1}), ASCEND) is None
    assert not caplog.records


def test_keys_travel_apart_for_ascends_second_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMIC_EPLB", "true")
    monkeypatch.setattr("eplb_platform.integrations.vllm.launch_checks.check_backend", lambda *_: None)
    given = {"eplb_config": {"num_redundant_experts": 2}, "transfer_timeout_s": 5.0, "refresh": True}
    arguments = Arguments(given)
    serving = ask(arguments, ASCEND_V2)
    with configuration._handed_over(arguments, serving.eplb):  # type: ignore[arg-type]  # a stand-in
        assert arguments.additional_config == {"refresh": True}
        assert "DYNAMIC_EPLB" not in os.environ
    assert os.environ["DYNAMIC_EPLB"] == "true"
    assert given["eplb_config"] == {"num_redundant_experts": 2}
    assert configuration.of_worker(worker_config({"refresh": True})) == serving.eplb


class PlatformOfTomorrow:
    """An out-of-tree platform with the hooks that are under discussion."""

    device_type = "npu"

    def __init__(self, supports_eplb: bool) -> None:
        self._supports_eplb = supports_eplb

    def supports_eplb(self) -> bool:
        return self._supports_eplb

    def check_and_update_eplb_config(self, parallel_config: object) -> None: ...


class PlatformThatWarns:
    """vLLM's platforms answer None for what they lack, with a warning."""

    device_type = "cuda"

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"asked for {name}")


def test_hooks_of_the_platform() -> None:
    platform = DevicePlatform.of(PlatformOfTomorrow(supports_eplb=False), uses_v2_runner=True)
    assert "supports no EPLB" in refusal({"dynamic_eplb": True}, platform)
    assert platform.communicator is None
    assert not DevicePlatform.of(PlatformOfTomorrow(supports_eplb=True), True).refuses_eplb


def test_platform_without_hooks() -> None:
    platform = DevicePlatform.of(PlatformThatWarns(), uses_v2_runner=None)
    assert platform == DevicePlatform("cuda")
    assert platform.communicator == "torch_gloo"


# --- how it is said ---


def test_server_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    server = SimpleNamespace(name="OPENAI_API_SERVER")
    with pytest.raises(SystemExit) as caught:
        configuration.fail(ConfigError("a line\nthat was two"), server)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "eplb_platform: a line that was two\n"


@pytest.mark.parametrize("usage_context", [None, SimpleNamespace(name="LLM_CLASS")])
def test_elsewhere_the_error_is_raised(usage_context: object) -> None:
    with pytest.raises(ConfigError, match="a line"):
        configuration.fail(ConfigError("a line"), usage_context)
