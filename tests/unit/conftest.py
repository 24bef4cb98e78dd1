"""What all unit tests have in common."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test depends on the time that it takes: the machine may be busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
