"""NIXL, where it is installed: what is used of it, and its version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Protocol, cast

_PLUGIN = "UCX"
_THREAD_SAFE = "NIXL_THREAD_SYNC_STRICT"

Region = tuple[int, int, int]
"""Address, bytes, device number."""


class Transfer(Protocol):
    """A read that was made ready."""

    def release(self) -> None: ...


class Agent(Protocol):
    """What is used of `nixl_agent`. Its errors are of several classes, all below `Exception`."""

    def register_memory(self, regions: Sequence[tuple[int, int, int, str]], kind: str, /) -> object: ...

    def get_agent_metadata(self) -> bytes: ...

    def add_remote_agent(self, metadata: bytes, /) -> str | bytes: ...

    def get_xfer_descs(self, regions: Sequence[Region], kind: str, /) -> object: ...

    def initialize_xfer(
        self, operation: str, local: object, remote: object, name: str, notice: bytes, /
    ) -> Transfer: ...

    def transfer(self, handle: Transfer, /) -> str: ...

    def check_xfer_state(self, handle: Transfer, /) -> str: ...

    def send_notif(self, name: str, notice: bytes, /) -> None: ...

    def get_new_notifs(self) -> Mapping[str, Sequence[bytes]]: ...


class _Api(Protocol):
    def nixl_agent(self, name: str, config: object, /) -> Agent: ...

    def nixl_agent_config(
        self, *, backends: Sequence[str], enable_prog_thread: bool, sync_mode: object
    ) -> object: ...


def is_installed() -> bool:
    """Whether there is a package to import, and not just a folder of that name; it is not imported."""
    found = find_spec("nixl")
    return found is not None and found.origin is not None


def versions() -> dict[str, str]:
    """{"nixl": its version}, or nothing; it is not imported."""
    try:
        return {"nixl": version("nixl")} if is_installed() else {}
    except PackageNotFoundError:
        return {"nixl": "unknown"}


def new_agent(name: str) -> Agent:
    """An agent over UCX. It moves on inside calls only: a thread of its own would take a part of a core.

    Raises whatever the library does, `ImportError` and its own errors included.
    """
    module = import_module("nixl._api")
    module.logger.setLevel("WARNING")  # else it prints two lines for each agent
    modes = module.nixl_thread_sync_t
    api = cast(_Api, module)
    config = api.nixl_agent_config(
        backends=[_PLUGIN], enable_prog_thread=False, sync_mode=getattr(modes, _THREAD_SAFE)
    )
    agent = api.nixl_agent(name, config)
    if _PLUGIN not in getattr(agent, "backends", {}):
        raise RuntimeError(f"NIXL has no plugin {_PLUGIN}")
    return agent
