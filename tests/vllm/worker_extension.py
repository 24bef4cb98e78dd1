"""What the tests look at, and break on purpose, inside vLLM's workers (vLLM's `worker_extension_cls`)."""

from __future__ import annotations

import os
from typing import Any


class Probe:
    """Mixed into the worker class; its methods are called through `collective_rpc`."""

    def probe_pid(self) -> int:
        return os.getpid()

    def probe_modules(self, prefix: str) -> list[str]:
        """Modules of that prefix that this worker has loaded."""
        import sys

        return sorted(name for name in sys.modules if name.startswith(prefix))

    def probe_physical_to_logical(self) -> list[list[list[int]]]:
        """vLLM's own device tables, one for each balanced model."""
        return [state.physical_to_logical_map.tolist() for state in self._models()]

    def probe_misroute(self) -> int:
        """Swap the physical experts that logical experts 0 to 7 are routed to with those of the next eight,
        in every layer, and leave the weights where they are. Returns how many table entries have changed.
        """
        changed = 0
        for state in self._models():
            table = state.logical_to_physical_map
            before = table.clone()
            table[:, :8] = before[:, 8:16]
            table[:, 8:16] = before[:, :8]
            counts = state.logical_replica_count
            old_counts = counts.clone()
            counts[:, :8] = old_counts[:, 8:16]
            counts[:, 8:16] = old_counts[:, :8]
            changed += int((table != before).sum())
        return changed

    def _models(self) -> list[Any]:
        runner = self.model_runner  # type: ignore[attr-defined]
        return list(runner.eplb_state.model_states.values())

    def probe_layer_tensors(self) -> list[list[str]]:
        """Of each layer of the main model: the names of what it keeps for its experts, moved or not."""
        from eplb_platform.integrations.vllm.eplb_state import balancing_of

        balancing = balancing_of(self.model_runner.eplb_state)  # type: ignore[attr-defined]
        assert balancing is not None and balancing._main is not None
        model = balancing._main.model
        return [sorted(model.layer_tensors(layer)) for layer in range(model.expert_map.num_layers)]

    def probe_stop_at_fetch(self, sign: str) -> None:
        """From now on a transfer of this worker stops half way, and the file `sign` says so; it goes on once
        that file is gone.
        """
        import time
        from pathlib import Path

        from eplb_platform.migration.transfer import Migrator

        fetch = Migrator.fetch

        def stop(migrator: Any, *args: Any, **kwargs: Any) -> Any:
            Path(sign).touch()
            deadline = time.monotonic() + 60.0
            while Path(sign).exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            return fetch(migrator, *args, **kwargs)

        Migrator.fetch = stop  # type: ignore[method-assign]
