"""What all unit tests have in common."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No test depends on the time that it takes: the machine may be busy. The examples are the same each time, so
# that a build fails for what was changed in it; EXPLORE=1 draws others.
settings.register_profile(
    "repeatable",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not os.environ.get("EXPLORE"),
    database=None,
)
settings.load_profile("repeatable")
