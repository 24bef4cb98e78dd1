"""The code that accelerators share, over simulated streams."""

from __future__ import annotations

from typing import ClassVar

from eplb_backends.accelerator import AcceleratorBackend
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams, SimulatedTimer


class SimulatedBackend(AcceleratorBackend):
    name: ClassVar[str] = "simulated"
    device_type: ClassVar[str] = "cpu"
    collective: ClassVar[str] = "gloo"
    seed: ClassVar[int] = 0

    @classmethod
    def availability(cls) -> Availability:
        return Availability(True, "nothing runs on a device")

    def default_streams(self) -> StreamOperations:
        return SimulatedStreams(SimulatedDevice(self.seed))

    def use(self, streams: SimulatedStreams) -> None:
        """Go on with the streams of another device, between two exchanges."""
        self.streams = streams
        assert self._transfer is not None
        self._transfer = self._new_transfer()

    def timer(self) -> DeviceTimer:
        assert isinstance(self.streams, SimulatedStreams)
        return SimulatedTimer(self.streams)
