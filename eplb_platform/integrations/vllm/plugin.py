"""Where the plugin takes hold of vLLM."""

from __future__ import annotations


def install() -> None:
    """Wrap the front end's and the worker's entrances; see `configuration` and `worker`."""
