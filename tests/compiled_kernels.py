"""Compile the kernels that a balancer starts with, so that ranks of tests find them in the cache.

A rank compiles for half a minute and more where nothing is cached, while the other ranks of its test wait for
it in the model's collectives, whose time-outs are short here.
"""

from __future__ import annotations

from eplb_platform import dispatch, heat
from eplb_platform.algorithms import survival
from eplb_platform.algorithms.discovery import discover_algorithms
from eplb_platform.migration import schedule


def compile_kernels() -> None:
    for algorithm in discover_algorithms().values():
        algorithm().warm_up()
    for module in (dispatch, heat, schedule, survival):
        module.warm_up()
