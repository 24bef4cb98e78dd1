"""Running a function once a module has been imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from eplb_platform.integrations.vllm.import_hook import when_imported


@pytest.fixture
def late_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and has not been yet."""
    name = "late_module_of_the_test"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield name
    sys.modules.pop(name, None)
    sys.meta_path[:] = finders


def test_a_module_in_memory_is_handed_over_at_once() -> None:
    seen: list[ModuleType] = []
    when_imported("json", seen.append)
    assert seen == [sys.modules["json"]]


def test_a_late_module_is_handed_over_after_its_import_and_only_then(late_module: str) -> None:
    values: list[int] = []
    when_imported(late_module, lambda module: values.append(module.value))
    assert late_module not in sys.modules
    assert values == []
    __import__(late_module)
    assert values == [1]
    __import__(late_module)
    assert values == [1]


def test_two_callbacks_of_one_module_both_run(late_module: str) -> None:
    seen: list[str] = []
    when_imported(late_module, lambda module: seen.append("first"))
    when_imported(late_module, lambda module: seen.append("second"))
    __import__(late_module)
    assert sorted(seen) == ["first", "second"]


def test_the_finders_are_left_as_they_were(late_module: str) -> None:
    before = list(sys.meta_path)
    when_imported(late_module, lambda module: None)
    module = __import__(late_module)
    assert sys.meta_path == before
    assert type(module.__spec__.loader).__module__ != when_imported.__module__


def test_a_module_that_fails_to_import_fails_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module_of_the_test.py").write_text("raise OSError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[ModuleType] = []
    when_imported("broken_module_of_the_test", seen.append)
    with pytest.raises(OSError, match="no"):
        __import__("broken_module_of_the_test")
    assert seen == []
