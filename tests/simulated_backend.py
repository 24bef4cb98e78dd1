"""The code that accelerators share, over simulated streams and a simulated collective library."""

from __future__ import annotations

from typing import ClassVar

from torch.distributed import Store

from eplb_backends.accelerator import AcceleratorBackend
from eplb_backends.accelerator.collective_transfer import DeviceGroup
from eplb_platform.backend import Availability, DeviceTimer, StreamOperations
from eplb_platform.testing.simulated_accelerator import SimulatedDevice, SimulatedStreams, SimulatedTimer
from eplb_platform.testing.simulated_collective import SimulatedCollective


class SimulatedBackend(AcceleratorBackend):
    name: ClassVar[str] = "simulated"
    device_type: ClassVar[str] = "cpu"
    device_collective: ClassVar[str | None] = "simulated"
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
        if self._nixl_group is not None:  # which knows the rooms of the one before
            self.rebuild(self._epoch + 1)

    def timer(self) -> DeviceTimer:
        assert isinstance(self.streams, SimulatedStreams)
        return SimulatedTimer(self.streams)

    def _new_device_group(self, store: Store) -> DeviceGroup:
        assert isinstance(self.streams, SimulatedStreams)
        return SimulatedCollective(self.streams, store, self._place[0])


class SimulatedCollectiveBackend(SimulatedBackend):
    """Its exchanges are enqueued by the forward thread."""

    def __init__(self) -> None:
        super().__init__(transport="collective")
