"""Algorithms by name, through the entry points `eplb_platform.algorithms`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import TypeAlias

from eplb_platform.algorithms.algorithm import Algorithm, AlgorithmError

NAMESPACE = "eplb_platform.algorithms"
# Other engines' planners behind the same interface: for measuring beside ours, not for serving.
PEERS_NAMESPACE = "eplb_platform.peers"

OptionValue: TypeAlias = bool | int | float | str | Sequence[float] | None


def discover_algorithms() -> dict[str, type[Algorithm]]:
    """The class of every algorithm that can be loaded, by name, in alphabetical order.

    One that fails to load is left out; `load_algorithm` says why.
    """
    found, _ = _load_entry_points(_installed_names())
    return dict(sorted(found.items()))


def discover_peers() -> tuple[dict[str, type[Algorithm]], dict[str, BaseException]]:
    """The planners of other engines by name, and why those that cannot be loaded cannot."""
    return _load_entry_points(_installed_names(PEERS_NAMESPACE), PEERS_NAMESPACE)


@cache
def load_algorithm(name: str) -> type[Algorithm]:
    """The class of the algorithm `name`.

    Raises ValueError for an unknown name, naming the known ones, and AlgorithmError for an algorithm that is
    installed but fails to load, with the reason.
    """
    known = _installed_names()
    if name not in known:
        raise ValueError(_unknown(f"no algorithm {name!r}", name, known))
    found, failures = _load_entry_points((name,))
    if name not in found:
        reason = failures[name]
        raise AlgorithmError(f"algorithm {name!r} is installed but cannot be loaded: {reason!r}") from reason
    return found[name]


def make_algorithm(name: str, options: Mapping[str, OptionValue]) -> Algorithm:
    """The algorithm `name` made with `options`; ValueError for an unknown one, naming the known ones."""
    algorithm = load_algorithm(name)
    parameters = inspect.signature(algorithm).parameters.values()
    if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        known = tuple(sorted(parameter.name for parameter in parameters))
        for option in options:
            if option not in known:
                raise ValueError(_unknown(f"algorithm {name!r} has no option {option!r}", option, known))
    return algorithm(**options)


def _installed_names(namespace: str = NAMESPACE) -> tuple[str, ...]:
    from stevedore import NamedExtensionManager  # 50 ms: only where a name must be resolved

    # Naming none, so that none is loaded.
    manager: NamedExtensionManager[object] = NamedExtensionManager(namespace, [])
    return tuple(sorted({entry_point.name for entry_point in manager.list_entry_points()}))


def _load_entry_points(
    names: tuple[str, ...], namespace: str = NAMESPACE
) -> tuple[dict[str, type[Algorithm]], dict[str, BaseException]]:
    """The classes of the named entry points, and what went wrong with those that did not load."""
    from stevedore import NamedExtensionManager

    failures: dict[str, BaseException] = {}
    manager: NamedExtensionManager[object] = NamedExtensionManager(
        namespace,
        list(names),
        on_load_failure_callback=lambda _, entry_point, error: failures.update({entry_point.name: error}),
    )
    found: dict[str, type[Algorithm]] = {}
    for extension in manager:
        if isinstance(extension.plugin, type) and issubclass(extension.plugin, Algorithm):
            found[extension.name] = extension.plugin
        else:
            failures[extension.name] = TypeError(f"{extension.plugin!r} is not an Algorithm class")
    return found, failures


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    nearest = get_close_matches(name, known, n=1)
    guess = f", did you mean {nearest[0]!r}?" if nearest else ""
    return f"{what}{guess} (known: {', '.join(known) or 'none'})"
