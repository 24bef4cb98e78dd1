from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_platform import EplbConfig
from eplb_platform.config import ConfigError, Mode


def read(environ: dict[str, str] | None = None, **keys: Any) -> EplbConfig:
    """The configuration with `keys` under eplb_config; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return EplbConfig.from_additional_config({"eplb_config": keys}, environ=environ or {})


def test_nothing_configured_means_off() -> None:
    for additional_config in ({}, None, {"eplb_config": {}}, {"eplb_config": None}, {"of_others": 1}):
        config = EplbConfig.from_additional_config(additional_config, environ={})
        assert config == EplbConfig()
        assert config.mode is Mode.OFF
        assert not (config.moves_experts or config.records_map or config.observes)


def test_every_documented_key_and_its_default() -> None:
    assert EplbConfig().model_dump() == {
        "dynamic_eplb": False,
        "expert_map_path": None,
        "expert_map_record_path": None,
        "expert_heat_collection_interval": 600,
        "algorithm_execution_interval": 50,
        "num_redundant_experts": 0,
        "eplb_policy_type": "adaptive",
        "load_collection_phase": "all",
        "load_windows": 16,
        "layer_updates_per_step": 1,
        "min_balancedness": 1.0,
        "max_moved_experts_per_layer": None,
        "survive": "none",
        "weighted_dispatch": False,
        "staging_memory_mb": None,
        "transfer_timeout_s": 30.0,
        "commit_margin_steps": 4,
        "verify_transfers": False,
        "check_expert_tensors": True,
        "enable_expert_compute_profiling": False,
        "compute_cost_alpha": 0.5,
        "expert_compute_profiling_warmup_steps": 10,
        "expert_compute_profiling_interval": 1,
        "compute_cost_record_path": None,
        "trace_record_path": None,
        "trace_record_range": None,
        "log_balancedness": False,
        "log_balancedness_interval": 600,
        "backend": "auto",
        "transport": "auto",
        "backend_options": {},
    }
    assert all(field.description for field in EplbConfig.model_fields.values())


def test_a_backend_is_handed_its_options_and_the_transport_that_was_chosen() -> None:
    assert read().backend_arguments == {}
    hccl = {"hccl_options": {"hccl_buffer_size": 200}}
    config = read(transport="collective", backend_options=hccl)
    assert config.backend_arguments == {**hccl, "transport": "collective"}
    with pytest.raises(ConfigError, match="transport: 'tcp', expected one of 'auto', 'host', 'collective'"):
        read(transport="tcp")
    with pytest.raises(ConfigError, match="did you mean 'backend_options'"):
        read(backend_option=hccl)


def test_what_json_says_is_read_and_written_back() -> None:
    keys = {
        "dynamic_eplb": True,
        "expert_map_path": "maps/first.json",
        "expert_heat_collection_interval": 400,
        "eplb_policy_type": 1,
        "staging_memory_mb": 64,
        "min_balancedness": 0.95,
    }
    config = read(**json.loads(json.dumps(keys)))
    assert config.model_dump(include=set(keys)) == keys
    assert EplbConfig(**config.model_dump()) == config
    assert read(expert_map_path=Path("a") / "map.json").expert_map_path == str(Path("a") / "map.json")


@pytest.mark.parametrize(
    ("keys", "mode", "moves", "records", "observes"),
    [
        ({}, Mode.OFF, False, False, False),
        ({"expert_map_path": "a.json"}, Mode.STATIC, False, False, False),
        ({"expert_map_record_path": "a.json"}, Mode.RECORD, False, True, True),
        ({"expert_map_path": "a.json", "expert_map_record_path": "b.json"}, Mode.RECORD, False, True, True),
        ({"dynamic_eplb": True}, Mode.DYNAMIC, True, False, True),
        ({"dynamic_eplb": True, "expert_map_record_path": "a.json"}, Mode.DYNAMIC, True, True, True),
        ({"trace_record_path": "a.safetensors"}, Mode.OFF, False, False, True),
        ({"log_balancedness": True}, Mode.OFF, False, False, True),
    ],
)
def test_modes(keys: dict[str, Any], mode: Mode, moves: bool, records: bool, observes: bool) -> None:
    config = read(**keys)
    assert (config.mode, config.moves_experts, config.records_map, config.observes) == (
        mode,
        moves,
        records,
        observes,
    )


@pytest.mark.parametrize(
    ("policy", "algorithm"),
    [(0, "random"), (1, "deepseek"), (2, "swift_balancer"), (3, "flashlb"), ("my-own", "my-own")],
)
def test_policies_by_number_and_name(policy: int | str, algorithm: str) -> None:
    assert read(eplb_policy_type=policy).algorithm == algorithm


def test_load_windows_are_at_most_one_for_each_step() -> None:
    assert read().num_load_windows == 16
    assert read(expert_heat_collection_interval=5).num_load_windows == 5


COUNT = "expected an integer of at least 0"
POSITIVE = "expected an integer of at least 1"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dynamic_eplb", 1, "1, expected true or false"),
        ("dynamic_eplb", "true", "'true', expected true or false"),
        ("expert_heat_collection_interval", "600", f"'600', {POSITIVE}"),
        ("expert_heat_collection_interval", 0, f"0, {POSITIVE}"),
        ("expert_heat_collection_interval", True, f"True, {POSITIVE}"),
        ("expert_heat_collection_interval", 600.0, f"600.0, {POSITIVE}"),
        ("expert_heat_collection_interval", None, f"None, {POSITIVE}"),
        ("algorithm_execution_interval", -1, f"-1, {COUNT}"),
        ("num_redundant_experts", -1, f"-1, {COUNT}"),
        ("eplb_policy_type", 4, "4, expected the name of an algorithm, or 0 to 3 for random, deepseek"),
        ("eplb_policy_type", "1", "'1', expected the name of an algorithm, or 0 to 3"),
        ("eplb_policy_type", True, "True, expected the name of an algorithm"),
        ("eplb_policy_type", " ", "' ', expected the name of an algorithm"),
        ("load_collection_phase", "prefil", "'prefil', expected one of 'all', 'prefill', 'decode'"),
        ("load_windows", 1025, "1025, expected an integer from 1 to 1024"),
        ("layer_updates_per_step", 0, f"0, {POSITIVE}"),
        ("min_balancedness", 1.5, "1.5, expected a number from 0 to 1"),
        ("min_balancedness", float("nan"), "nan, expected a number from 0 to 1"),
        ("max_moved_experts_per_layer", 0, f"0, {POSITIVE}, or null"),
        ("staging_memory_mb", 0, "0, expected a number above 0, or null"),
        ("staging_memory_mb", float("inf"), "inf, expected a number above 0, or null"),
        ("transfer_timeout_s", 0, "0, expected a number above 0"),
        ("commit_margin_steps", 0, f"0, {POSITIVE}"),
        ("compute_cost_alpha", True, "True, expected a number from 0 to 1"),
        ("expert_map_path", 7, "7, expected the path of a .json file, or null"),
        ("expert_map_path", "", "'', expected the path of a .json file, or null"),
        ("expert_map_path", "maps/", "'maps/', expected the path of a .json file, or null"),
        ("expert_map_record_path", "map.txt", "'map.txt', expected the path of a .json file, or null"),
        ("expert_map_record_path", "a\0.json", r"'a\x00.json', expected the path of a .json file"),
        (
            "trace_record_path",
            "trace.json",
            "'trace.json', expected the path of a .safetensors file, or null",
        ),
        ("trace_record_range", "200-100", "'200-100', expected iterations as 'first-end' with first < end"),
        ("trace_record_range", "100", "'100', expected iterations"),
        ("trace_record_range", 100, "100, expected iterations"),
        ("backend", "", "'', expected a name"),
        ("commit_margin_steps", "x" * 1000, "..., expected an integer of at least 1"),
    ],
)
def test_wrong_values_are_named_on_one_line(key: str, value: object, expected: str) -> None:
    for make in (read, EplbConfig):
        with pytest.raises(ConfigError) as caught:
            make(**{key: value})
        message = str(caught.value)
        assert message.startswith(f"eplb_config.{key}: ")
        assert expected in message
        assert "\n" not in message
        assert len(message) < 300


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("expert_heat_collection_intervl", "expert_heat_collection_interval"),
        ("expert-map-path", "expert_map_path"),
        ("Dynamic_EPLB", "dynamic_eplb"),
        ("eplb_heat_collection_stages", "eplb_heat_collection_stage"),
        ("num_redundant_expert", "num_redundant_experts"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**{key: 1})
    assert str(caught.value) == f"eplb_config.{key}: unknown key, did you mean {nearest!r}?"


def test_keys_unlike_any_known_one_get_the_list() -> None:
    with pytest.raises(
        ConfigError, match=r"eplb_config\.zzz: unknown key, the known ones are dynamic_eplb, "
    ):
        read(zzz=1)
    with pytest.raises(ConfigError, match=r"eplb_config\.'a\\nb': unknown key") as caught:
        read(**{"a\nb": 1})
    assert "\n" not in str(caught.value)


def test_all_faults_are_on_the_line() -> None:
    with pytest.raises(
        ConfigError, match=r"dynamic_eplb: 2, .*; eplb_config\.backend: 3, .*; eplb_config\.x"
    ):
        read(dynamic_eplb=2, backend=3, x_y_z_q=1)


@pytest.mark.parametrize(
    ("additional_config", "message"),
    [
        ([], r"additional_config: \[\], expected an object"),
        ({"eplb_config": [1]}, r"eplb_config: \[1\], expected an object of keys and values"),
        ({"eplb_config": "{}"}, "eplb_config: '{}', expected an object"),
        ({"eplb_config": {1: 2}}, "eplb_config: the key 1, expected text"),
        ({"eplb_confg": {}}, r"additional_config\.eplb_confg: unknown key, did you mean 'eplb_config'\?"),
        ({"eplb-config": {}}, "did you mean 'eplb_config'"),
    ],
)
def test_what_is_no_section_is_refused(additional_config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EplbConfig.from_additional_config(additional_config, environ={})


def test_both_names_of_the_collection_phase_are_read() -> None:
    assert read(eplb_heat_collection_stage="decode").load_collection_phase == "decode"
    assert read(load_collection_phase="decode").eplb_heat_collection_stage == "decode"
    assert EplbConfig(eplb_heat_collection_stage="prefill").load_collection_phase == "prefill"  # type: ignore[call-arg]
    assert read(eplb_heat_collection_stage="all", load_collection_phase="all") == EplbConfig()
    with pytest.raises(ConfigError, match="load_collection_phase is 'all' and eplb_heat_collection_stage is"):
        read(eplb_heat_collection_stage="decode", load_collection_phase="all")


FORMER = {
    "num_iterations_eplb_update": ("expert_heat_collection_interval", 400),
    "num_wait_worker_iterations": ("algorithm_execution_interval", 30),
    "init_redundancy_expert": ("num_redundant_experts", 16),
}


@pytest.mark.parametrize("former", FORMER)
@pytest.mark.parametrize("nested", [True, False])
def test_names_of_the_first_release_are_read_with_a_warning(former: str, nested: bool) -> None:
    key, value = FORMER[former]
    given_keys = {former: value}
    with pytest.warns(DeprecationWarning, match=rf"{former} is deprecated, write eplb_config\.{key}"):
        config = EplbConfig.from_additional_config(
            {"eplb_config": given_keys} if nested else given_keys, environ={}
        )
    assert getattr(config, key) == value


def test_current_names_beside_the_section_are_read_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"additional_config\.dynamic_eplb is deprecated"):
        config = EplbConfig.from_additional_config({"dynamic_eplb": True, "backend": "of others"}, environ={})
    assert config == EplbConfig(dynamic_eplb=True)


def test_gate_eplb_has_no_effect() -> None:
    with pytest.warns(DeprecationWarning, match="gate_eplb is deprecated and has no effect"):
        assert (
            EplbConfig.from_additional_config({"eplb_config": {"gate_eplb": True}}, environ={})
            == EplbConfig()
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_names_that_contradict_each_other_are_refused() -> None:
    both = {"num_iterations_eplb_update": 3, "expert_heat_collection_interval": 4}
    with pytest.raises(ConfigError, match=r"num_iterations_eplb_update: 3, but .* is 4; keep one of them"):
        EplbConfig.from_additional_config({"eplb_config": both}, environ={})
    with pytest.raises(ConfigError, match=r"additional_config\.dynamic_eplb: False, but .* is True"):
        EplbConfig.from_additional_config({"dynamic_eplb": False, "eplb_config": {"dynamic_eplb": True}})
    same = {"num_iterations_eplb_update": 4, "eplb_config": {"expert_heat_collection_interval": 4}}
    assert EplbConfig.from_additional_config(same, environ={}).expert_heat_collection_interval == 4


def test_environment_decides_where_the_configuration_asks_for_nothing() -> None:
    on = {"DYNAMIC_EPLB": "true", "EXPERT_MAP_RECORD": "true"}
    assert read(environ=on).mode is Mode.DYNAMIC
    assert read(environ={"DYNAMIC_EPLB": "1"}).mode is Mode.DYNAMIC
    assert read(environ={"DYNAMIC_EPLB": ""}).mode is Mode.OFF
    assert read(environ=on, expert_map_path="a.json").mode is Mode.STATIC
    assert read(environ=on, expert_map_record_path="a.json").mode is Mode.RECORD
    assert read(environ=on, dynamic_eplb=False).mode is Mode.OFF


def test_environment_switches_off_with_a_warning() -> None:
    keys = {"eplb_config": {"dynamic_eplb": True, "expert_map_record_path": "a.json"}}
    with pytest.warns(UserWarning, match=r"DYNAMIC_EPLB is false: eplb_config\.dynamic_eplb is ignored"):
        assert EplbConfig.from_additional_config(keys, environ={"DYNAMIC_EPLB": "False"}).mode is Mode.RECORD
    with pytest.warns(UserWarning, match="EXPERT_MAP_RECORD is false: .*expert_map_record_path is ignored"):
        config = EplbConfig.from_additional_config(keys, environ={"EXPERT_MAP_RECORD": "0"})
    assert config == EplbConfig(dynamic_eplb=True)


@pytest.mark.parametrize(
    ("environ", "given", "path", "steps"),
    [
        ({"EXPERT_STATISTIC_PATH": "a/b"}, {}, "a/b/expert_load.safetensors", None),
        (
            {"EXPERT_STATISTIC_PATH": "a", "EXPERT_STATISTIC_ITER_RANGE": "5-15"},
            {},
            "a/expert_load.safetensors",
            range(5, 15),
        ),
        (
            {"EXPERT_STATISTIC_ITER_RANGE": "5-15"},
            {},
            "expert_statistic/expert_load.safetensors",
            range(5, 15),
        ),
        (
            {"EXPERT_STATISTIC_PATH": "a", "EXPERT_STATISTIC_ITER_RANGE": "5-15"},
            {"trace_record_path": "t.safetensors", "trace_record_range": "1-2"},
            "t.safetensors",
            range(1, 2),
        ),
        ({"EXPERT_STATISTIC_PATH": " "}, {}, None, None),
    ],
)
def test_statistic_variables_ask_for_a_load_trace(
    environ: dict[str, str], given: dict[str, Any], path: str | None, steps: range | None
) -> None:
    config = read(environ=environ, **given)
    assert (config.trace_record_path, config.trace_range) == (path, steps)


def test_a_wrong_range_in_the_environment_is_named() -> None:
    with pytest.raises(
        ConfigError, match="environment variable EXPERT_STATISTIC_ITER_RANGE: '7', expected iter"
    ):
        read(environ={"EXPERT_STATISTIC_ITER_RANGE": "7"})


def test_environment_variables_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMIC_EPLB", "maybe")
    with pytest.raises(
        ConfigError, match="environment variable DYNAMIC_EPLB: 'maybe', expected true or false"
    ):
        EplbConfig.from_additional_config({})


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        EplbConfig().dynamic_eplb = True  # type: ignore[misc]


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from(list(EplbConfig.model_fields)) | st.text(), JSON_VALUES | st.just({})))
def test_whatever_is_written_is_a_configuration_or_one_line(keys: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for additional_config in ({"eplb_config": keys}, keys):
            try:
                EplbConfig.from_additional_config(additional_config, environ={})
            except ConfigError as error:
                assert str(error).isprintable()
