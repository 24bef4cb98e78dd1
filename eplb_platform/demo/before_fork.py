"""Imported once, by the process that all ranks are forked from: what takes seconds is done here.

The ranks inherit the modules, and the planning kernels compiled: with four ranks on two cores each would
otherwise compile them beside the others, in every phase.
"""

from __future__ import annotations

import eplb_platform.demo.rank_process  # noqa: F401 - for what it imports
from eplb_platform.algorithms import load_algorithm
from eplb_platform.config import EplbConfig
from eplb_platform.migration.schedule import warm_up

load_algorithm(EplbConfig().algorithm)().warm_up()
warm_up()
