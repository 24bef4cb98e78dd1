"""The ways in which weights move between ranks, and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from eplb_backends.accelerator import nixl_library

TRANSPORTS = {
    "host": "through pinned host memory and gloo, by the background thread",
    "nixl": "NIXL, by the background thread, in device memory where it knows the device",
    "collective": "the device's collective library, enqueued by the forward thread at an agreed boundary",
}
AUTO = "auto"
"""Whichever needs no choice of the user's: `nixl` where all ranks have it and it works, else `host`."""


def choose_transport(name: str, transport: str, *, device_collective: str | None) -> str:
    """The transport that is meant; "auto" where the ranks have still to agree on one.

    name: the backend's, for errors
    device_collective: the device's collective library, None where there is none
    Raises `ValueError` for one that is unknown or not to be had, in one line that says what to write.
    """
    if transport == AUTO:
        return AUTO if nixl_library.is_installed() else "host"
    if not isinstance(transport, str) or transport not in TRANSPORTS:
        nearest = get_close_matches(str(transport), [*TRANSPORTS, AUTO], n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name}: no transport {transport!r}, the nearest is {nearest!r}; there are "
            f"{', '.join([AUTO, *TRANSPORTS])}"
        )
    if transport == "nixl" and not nixl_library.is_installed():
        raise ValueError(
            f"{name}: transport 'nixl' needs NIXL, which is not installed (pip install nixl): use 'host'"
        )
    if transport == "collective" and device_collective is None:
        raise ValueError(
            f"{name}: torch has no collective library here for transport 'collective': use 'host'"
        )
    return transport


def on_background_thread() -> str:
    """The transports that need no collective library of the device, for `Availability.reason`."""
    return "'host', 'nixl'" if nixl_library.is_installed() else "'host'"


def check_is_mapping(option: str, given: object) -> None:
    """Raise `ValueError` for what is not an object of a group's options and their values."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{option} is {given!r}, expected an object of options and values")


def check_has_effect(name: str, library: str, options: Mapping[str, object], transport: str) -> None:
    """Raise `ValueError` for options of a group of `library` that `transport` does not make."""
    if options and transport != "collective":
        raise ValueError(
            f"{name}: {', '.join(options)} would have no effect: transport {transport!r} makes no {library} "
            "group, 'collective' does"
        )


def check_nothing_waits(name: str, variables: Sequence[str]) -> None:
    """Raise `ValueError` where the environment has a thread wait for every operation that it enqueues."""
    for variable in variables:
        if os.environ.get(variable, "0") not in ("", "0"):
            raise ValueError(
                f"{name}: with {variable}={os.environ[variable]} the forward thread would wait for every "
                "exchange: unset it, or use transport 'host'"
            )
