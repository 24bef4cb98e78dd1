"""Hardware profiles: the packaged ones, one's own, and whatever else is in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eplb_platform.offline.hardware import HardwareProfile, ModelShape, load_profile, read_profile
from eplb_platform.records import RecordError

OWN: dict[str, Any] = {
    "name": "toy",
    "device": {
        "peak_tflops": 100,
        "compute_efficiency": 0.5,
        "memory_gb": 10,
        "memory_bandwidth_gb_s": 1000,
        "memory_efficiency": 0.5,
    },
    "links": {"ranks_per_node": 2, "intra_node_gb_s": 100, "inter_node_gb_s": 10, "efficiency": 1},
}


def written(folder: Path, document: object) -> Path:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("name", ["h100", "ascend910b", "H100"])
def test_packaged_profiles_are_known_by_name(name: str) -> None:
    profile = load_profile(name)
    assert profile.links.intra_node_bandwidth > profile.links.inter_node_bandwidth
    assert profile.device.memory_bandwidth < profile.device.memory_bandwidth_gb_s * 1e9
    assert profile.model == ModelShape()
    assert profile.model.expert_bytes == 3 * 7168 * 2048


def test_one_s_own_is_read_and_the_model_can_be_changed(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path, OWN))
    assert profile.device.flops == 50e12
    changed = profile.with_model({"hidden_size": 16, "bytes_per_weight": 0.5})
    assert changed.model.expert_bytes == 3 * 16 * 2048 * 0.5
    assert changed.links == profile.links
    with pytest.raises(ValueError, match=r"model\.hidden_size: 0, expected greater than or equal to 1"):
        profile.with_model({"hidden_size": 0})


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("device", "peak_tflops"), -1, "device.peak_tflops: -1, expected greater than 0"),
        (("device", "peak_tflops"), "1979", "device.peak_tflops: '1979', expected a valid number"),
        (("device", "peak_tflops"), True, "device.peak_tflops: True, expected a valid number"),
        (("device", "peak_tflops"), float("nan"), "device.peak_tflops: nan, expected"),
        (
            ("device", "memory_efficiency"),
            1.5,
            "device.memory_efficiency: 1.5, expected less than or equal to 1",
        ),
        (("links", "ranks_per_node"), 2.5, "links.ranks_per_node: 2.5, expected a valid integer"),
        (("links", "bandwidth"), 1, "links.bandwidth: unknown key"),
        (("device",), None, "device: None, expected a valid dictionary"),
    ],
)
def test_a_fault_is_named_with_its_key(
    place: tuple[str, ...], value: object, expected: str, tmp_path: Path
) -> None:
    document = {key: dict(part) if isinstance(part, dict) else part for key, part in OWN.items()}
    section = document
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    path = written(tmp_path, document)
    with pytest.raises(RecordError) as refused:
        read_profile(path)
    assert str(refused.value).startswith(f"{path}: {expected}")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="links: missing"):
        read_profile(written(tmp_path, {"name": "x", "device": OWN["device"]}))
    with pytest.raises(ValueError, match=r"no hardware profile 'h10', expected ascend910b, h100 .* 'h100'"):
        load_profile("h10")
    with pytest.raises(RecordError, match="No such file"):
        load_profile(tmp_path / "none.yaml")
    with pytest.raises(RecordError, match="expected a file"):
        read_profile(tmp_path)


@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_whatever_is_in_a_file_is_a_profile_or_an_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "hardware.yaml"
    path.write_bytes(content)
    with pytest.raises(RecordError):
        read_profile(path)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400), st.just([1])
)


@given(data=st.data())
def test_a_damaged_profile_is_a_profile_or_an_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    document = {key: dict(part) if isinstance(part, dict) else part for key, part in OWN.items()}
    section = document[data.draw(st.sampled_from(["device", "links"]))]
    section[data.draw(st.sampled_from(sorted(section)))] = data.draw(scalars)
    text = yaml.safe_dump(document, sort_keys=False)
    end = data.draw(st.integers(0, len(text)))
    path = tmp_path_factory.getbasetemp() / "hardware.yaml"
    path.write_text(text[:end] if data.draw(st.booleans()) else text)
    try:
        profile = read_profile(path)
    except RecordError:
        return
    assert isinstance(profile, HardwareProfile)
    assert profile.device.flops > 0 and profile.links.inter_node_bandwidth > 0
