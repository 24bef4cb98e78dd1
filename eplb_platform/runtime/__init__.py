"""The balancing cycle while serving: the balancer, its agreement with the other ranks, its ports."""

from __future__ import annotations

from eplb_platform.runtime.balancer import Balancer
from eplb_platform.runtime.cycle import Stage
from eplb_platform.runtime.deployment import DeploymentError
from eplb_platform.runtime.gate import ForwardStopped
from eplb_platform.runtime.meeting import MeetingFailed
from eplb_platform.runtime.resize_meeting import ResizeError
from eplb_platform.runtime.resizing import LostExpertsError
from eplb_platform.runtime.served_model import ServedModel
from eplb_platform.runtime.start import start_balancer
from eplb_platform.runtime.stats import BalancerStats

__all__ = [
    "Balancer",
    "BalancerStats",
    "DeploymentError",
    "ForwardStopped",
    "LostExpertsError",
    "MeetingFailed",
    "ResizeError",
    "ServedModel",
    "Stage",
    "start_balancer",
]
