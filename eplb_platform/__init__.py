"""One expert parallelism load balancer (EPLB) for mixture-of-experts models on every accelerator.

The public names are loaded on first use, so that importing the package stays cheap in processes that
need only a part of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eplb_platform.algorithms import Plan as Plan
    from eplb_platform.algorithms import rebalance_experts as rebalance_experts
    from eplb_platform.backend import Backend as Backend
    from eplb_platform.backend import discover_backends as discover_backends
    from eplb_platform.backend import load_backend as load_backend
    from eplb_platform.config import EplbConfig as EplbConfig
    from eplb_platform.expert_map import ExpertMap as ExpertMap
    from eplb_platform.runtime import Balancer as Balancer
    from eplb_platform.topology import Topology as Topology

_HOMES = {
    "Backend": "eplb_platform.backend",
    "Balancer": "eplb_platform.runtime",
    "EplbConfig": "eplb_platform.config",
    "ExpertMap": "eplb_platform.expert_map",
    "Plan": "eplb_platform.algorithms",
    "Topology": "eplb_platform.topology",
    "discover_backends": "eplb_platform.backend",
    "load_backend": "eplb_platform.backend",
    "rebalance_experts": "eplb_platform.algorithms",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
