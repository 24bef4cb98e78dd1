"""The control plane over a torch.distributed store (TCPStore in an engine; FileStore and HashStore work
too).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eplb_platform.runtime.ports import ControlPlane

if TYPE_CHECKING:
    from torch.distributed import Store


class StoreControlPlane(ControlPlane):
    """Calls block for one round trip; use one store client per thread, since a client serves one call at a
    time.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def settle(self, key: str, value: str) -> str:
        return self._store.compare_set(key, "", value).decode()

    async def read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    async def read_all(self, keys: Sequence[str]) -> list[str]:
        return [value.decode() for value in self._store.multi_get(list(keys))]

    async def count(self, key: str) -> int:
        return self._store.add(key, 1)

    async def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._store.delete_key(key)
