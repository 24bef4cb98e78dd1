"""Modules and a process group that stand in for what is not there, for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

Provide = Callable[..., ModuleType]


@contextmanager
def imported_from(folder: Path, names: tuple[str, ...]) -> Iterator[Provide]:
    """While it lasts, `folder` is imported from, and what it yields puts a stand-in module in place.

    At the end the modules of the packages `names`, real ones and stand-ins, are forgotten, and those that
    were there before are back.
    """

    def belongs(module: str) -> bool:
        return module.partition(".")[0] in names

    before = {name: module for name, module in sys.modules.items() if belongs(name)}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield _provide
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if belongs(name)]:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def one_process() -> Iterator[None]:
    """A real group of one process, over which a dump is summed; the one that is there, if there is one."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _provide(name: str, **attributes: object) -> ModuleType:
    """A module without a file, with these attributes."""
    module = ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module
