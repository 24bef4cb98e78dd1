"""What every way of weights asks of the messages that it is given."""

from __future__ import annotations

from collections.abc import Sequence

from eplb_platform.backend import Message


def check_messages(messages: Sequence[Message], *, rank: int, peers: Sequence[int], device_type: str) -> None:
    """Raise `ValueError` for a peer that is none, and for a tensor on another kind of device."""
    for message in messages:
        if message.peer not in peers:
            raise ValueError(
                f"rank {rank}: a message has peer {message.peer}; expected one of the other ranks "
                f"{peers} (copies on the rank itself are the caller's)"
            )
        if message.tensor.device.type != device_type:
            raise ValueError(
                f"rank {rank}: the tensor for rank {message.peer} is on {message.tensor.device}, "
                f"expected {device_type}: choose the backend of that device"
            )
