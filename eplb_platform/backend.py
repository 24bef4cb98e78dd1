"""The door between the balancer and a device family, and the discovery of who stands behind it.

A backend owns what differs between devices and nothing else: the process group that balancing uses, the
streams that copies run on, how an expert's weights are sent and swapped, and how token ids become physical
experts. Which tensors are an expert's weights is the integration's knowledge.

Threads: *forward* is the thread that runs the model, *background* the one that runs the balancing cycle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from inspect import isabstract, signature
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from eplb_platform.device_extensions import import_torch

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

CONTRACT_VERSION = 1
"""Raised when a backend written for the old contract would do wrong under the new one."""

NAMESPACE = "eplb_platform.backends"


class BackendError(RuntimeError):
    """A backend cannot be used; the message says which one and why."""


class GroupError(RuntimeError):
    """An operation of the process group failed or timed out: the group must be rebuilt before its next
    use.
    """


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine."""

    usable: bool
    reason: str
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """One tensor that travels to or from one peer. Both sides list the messages of a pair in the same
    order.
    """

    peer: int
    tensor: torch.Tensor


class PreparedExchange(Protocol):
    """An exchange of which all is ready that does not need the device's streams."""

    def enqueue(self) -> None:
        """Enqueue it on the current stream, and wait for nothing.

        Forward thread, inside `streams.transfer()`, at a boundary that all ranks agreed on. Its tensors are
        in use until a mark has passed that is recorded afterwards. Raises `GroupError`.
        """
        ...


class StreamOperations(ABC):
    """Order between the forward stream and the transfer stream of one device.

    Injected into a backend, so that a simulated accelerator can stand in for the device's own streams.
    """

    @abstractmethod
    def transfer(self) -> AbstractContextManager[None]:
        """Enter the transfer stream. Background thread: copies enqueued inside overlap the forward pass."""

    @abstractmethod
    def record(self) -> object:
        """Mark this point of the current stream. The mark stays valid until it is garbage collected.

        Raises RuntimeError while the current stream is being captured into a graph.
        """

    @abstractmethod
    def wait(self, mark: object) -> None:
        """Make the current stream, not the calling thread, wait until `mark` has passed."""

    @abstractmethod
    def passed(self, mark: object) -> bool:
        """Whether the device has passed `mark`. Never blocks."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source` into `target` on the current stream without synchronising the calling thread.

        Host memory comes from `Backend.allocate_on_host`. Both tensors may be given back at once.
        """

    def keep(self, tensor: torch.Tensor) -> None:  # noqa: B027  # host memory needs no care
        """The tensor may be given back while operations that use it are pending on the current stream."""

    def check_not_capturing(self) -> None:  # noqa: B027  # a device without graphs has nothing to check
        """Raise RuntimeError while the current stream is being captured into a graph.

        Forward thread, before anything is enqueued.
        """


class DeviceTimer(Protocol):
    """Measures time on the device between two points of the current stream."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def elapsed_ms(self) -> float | None:
        """Milliseconds between start and stop; None while the device has not passed both."""
        ...


class Backend(ABC):
    """One device family: its collectives, streams and weight movement.

    The group's methods (`connect` to `exchange`) are called from one thread at a time: `connect` and
    `warm_up` at start, `open_exchange` by the forward thread, everything else by the background thread.
    `abort` and `close` may come from any thread.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    """As in `torch.device.type`."""
    collective: str
    """The library that moves weights: gloo, nccl, hccl. A class says it of its default transport."""
    enqueues_on_forward: bool = False
    """Whether the forward thread has to enqueue exchanges, as operations of the device's group may not race
    the model's own. While serving, `prepare_exchange` then takes the place of `exchange`."""
    contract_version: ClassVar[int] = CONTRACT_VERSION

    def __init__(self, streams: StreamOperations | None = None) -> None:
        self.streams = streams if streams is not None else self.default_streams()

    @classmethod
    @abstractmethod
    def availability(cls) -> Availability:
        """Say whether this machine can run the backend. Cheap, never raises, imports only its own vendor
        library.
        """

    @abstractmethod
    def default_streams(self) -> StreamOperations:
        """The device's own stream operations."""

    # --- the group that balancing uses, apart from the model's own groups ---

    @abstractmethod
    def connect(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        """Create the group; every rank calls it once at start. No operation outlives `timeout_s` seconds.

        The backend makes a client of `store` for itself: other threads go on using the one it was given.
        """

    @abstractmethod
    def warm_up(self) -> None:
        """Touch every pair of ranks once, so that no connection is set up later. Every rank, right after
        connect.
        """

    @abstractmethod
    def abort(self) -> None:
        """Close the group at once: operations pending here and on its peers end with `GroupError`.

        No tensor given to `exchange` is written after this returns. Idempotent.
        """

    @abstractmethod
    def rebuild(self, epoch: int) -> None:
        """Replace an aborted group. Every rank calls it with the same new `epoch`; raises `GroupError` on
        time-out.
        """

    def attach(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        """As `connect`, but meet nobody yet: the group of fewer ranks than `num_ranks` comes with `regroup`.

        Optional, with `regroup`: for engines whose ranks come and go. Raises `GroupError` where a backend
        cannot.
        """
        raise GroupError(f"backend {self.name!r} cannot leave ranks out of its group: it has no `attach`")

    def regroup(self, epoch: int, ranks: Sequence[int]) -> None:
        """As `rebuild`, with `ranks` alone, ascending: each of them calls it with the same arguments.

        Numbers of ranks stay what they are, in messages too. `rebuild` is for the same ranks from now on.
        """
        raise GroupError(f"backend {self.name!r} cannot leave ranks out of its group: it has no `regroup`")

    @abstractmethod
    def close(self) -> None:
        """Give back the group and its threads. The backend is not used afterwards. Idempotent."""

    # --- what the background thread sends ---

    @abstractmethod
    def sum_on_host(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Element-wise sum over all ranks of an array of one shape, on every rank. Raises `GroupError`."""

    @abstractmethod
    def broadcast_on_host(self, values: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        """The array of rank `source` on every rank; others pass an array of the same shape. Raises
        `GroupError`.
        """

    @abstractmethod
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Move weights between ranks; returns when every tensor is received and every sent one may change
        again.

        Called inside `streams.transfer()`. Received tensors are only to be read on that stream, or by streams
        that waited for a mark recorded on it afterwards. Raises `GroupError`; what was received is then
        undefined. Where `enqueues_on_forward`, it is called where no model runs, at start and by `resize`, on
        the forward thread of every rank.
        """

    # --- the same, where the forward thread has to enqueue it: `enqueues_on_forward` ---

    def open_exchange(self, epoch: int) -> None:
        """Make the group anew that `enqueue` uses, after `rebuild(epoch)`, and touch every pair of ranks.

        Forward thread, at a boundary that all ranks agreed on; at start `warm_up` does it. May wait for the
        other ranks, with the time-out; `abort` ends that. Raises `GroupError`, and RuntimeError during graph
        capture.
        """
        raise NotImplementedError(f"backend {self.name!r} lacks open_exchange")

    def prepare_exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> PreparedExchange:
        """Make all ready for an `exchange` that the forward thread enqueues, so that it has little to do.

        Background thread, inside `streams.transfer()`. No tensor of a message is read or written yet.
        """
        raise NotImplementedError(f"backend {self.name!r} lacks prepare_exchange")

    # --- weights ---

    def check_moved_together(  # noqa: B027  # most devices couple nothing
        self,
        layer: Mapping[str, Sequence[torch.Tensor] | torch.Tensor],
        moved: Sequence[str],
        *,
        slots: int,
    ) -> None:
        """Raise `ValueError` unless the moved tensors of a layer are all that the device needs together.

        Forward thread, at start, for models that name the tensors of their layers (`NamedModel`), after a
        check for every device that no tensor of an expert stays behind.
        layer: tensors by name; moved: those that balancing moves; slots: physical experts on this rank
        """

    def allocate_on_host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that `streams.copy` takes without synchronising the thread: pinned, on a device.

        Called at start only, as it may stop the device.
        """
        import torch

        return torch.empty(tuple(shape), dtype=dtype)

    @abstractmethod
    def allocate_staging(
        self, parameter: Sequence[torch.Tensor] | torch.Tensor, slots: int
    ) -> Sequence[torch.Tensor]:
        """Room for `slots` experts of one parameter, one tensor per staged expert. Called at start only.

        `parameter` is a stacked tensor [slots, ...] or one tensor per slot; `parameter[slot]` is an expert's.
        """

    @abstractmethod
    def swap_in(
        self,
        parameter: Sequence[torch.Tensor] | torch.Tensor,
        slots: Sequence[int],
        staging: Sequence[torch.Tensor],
        rows: Sequence[int],
    ) -> None:
        """Overwrite `parameter[slots[i]]` in place with `staging[rows[i]]`. Forward thread, on the forward
        stream.
        """

    @abstractmethod
    def checksum(self, tensors: Sequence[torch.Tensor]) -> int:
        """A 63-bit checksum of the bytes of one expert's tensors, the same on every rank for the same bytes.

        Reads them on the current stream and waits for it. Background thread.
        """

    # --- the forward path ---

    @abstractmethod
    def map_and_record(
        self,
        logical_ids: torch.Tensor,
        logical_to_physical: torch.Tensor,
        replica_count: torch.Tensor,
        load: torch.Tensor | None,
        offset: int = 0,
    ) -> torch.Tensor:
        """Replace logical by physical expert ids and count them. Forward thread, no synchronisation.

        logical_ids: int [tokens, top_k]; an id of -1 marks padding: it stays -1 and is not counted.
        logical_to_physical: int [logical, width], row of one expert: its replicas, the first `replica_count`
        valid.
        replica_count: int [logical].
        load: int64 [physical], incremented in place by the tokens sent to each slot; None records nothing.
        offset: added to the token's row before the replica is chosen, so that ranks do not all choose the
        first. Returns int64 [tokens, top_k]; equal for equal arguments.
        """

    def record_group_list(
        self, load: torch.Tensor, group_list: torch.Tensor, group_list_type: int, *, first_slot: int
    ) -> None:
        """Count tokens where they are computed, from what an operator reports for the experts of this rank.

        Forward thread, no synchronisation; can be captured. In place of the `load` of `map_and_record`, which
        counts where tokens are sent from: with both, each would count twice.
        load: int64 [physical], incremented in place; group_list: [slots], as the operator gives it
        group_list_type: how it is to be read, in the vendor's numbers
        first_slot: physical id of this rank's first expert
        Raises `ValueError` for a list that cannot be read. Optional.
        """
        raise NotImplementedError(f"backend {self.name!r} lacks record_group_list")

    @abstractmethod
    def timer(self) -> DeviceTimer:
        """A new timer for the current device."""


# --- who stands behind the door ---


@dataclass(frozen=True)
class BackendReport:
    """What was found under one name: whether it can be used here and, in one line, why or why not."""

    name: str
    device_type: str
    """Empty, like `collective`, when the backend could not even be imported."""
    collective: str
    usable: bool
    reason: str
    versions: Mapping[str, str] = field(default_factory=dict)


def discover_backends(on_examine: Callable[[str], None] | None = None) -> list[BackendReport]:
    """A report on every installed backend, by name. Nothing that a backend does wrong is raised.

    on_examine: called with a name before that backend is imported and asked
    """
    reports = []
    for name, offers in _installed().items():
        if on_examine is not None:
            on_examine(name)
        reports.append(_examine(name, offers)[0])
    return reports


def load_backend(name: str = "auto", *, device_type: str | None = None, **options: object) -> Backend:
    """A new backend, not yet connected. Only the one that is named is imported.

    `auto` takes the usable one for `device_type` (as in `torch.device.type`; cpu if not given). `options` go
    to the backend's constructor. Raises `BackendError` when there is none, or more than one, or the named one
    is not usable, for another device, or does not take the options.
    """
    installed = _installed()
    if name == "auto":
        name = _only_one_for(device_type or "cpu", installed)
    if name not in installed:
        nearest = "".join(f" Did you mean {match!r}?" for match in get_close_matches(name, installed, n=1))
        raise BackendError(f"no backend {name!r}.{nearest} Installed: {', '.join(installed) or 'none'}")
    report, backend = _examine(name, installed[name])
    if backend is None:
        raise BackendError(f"backend {name!r} cannot be used: {report.reason}")
    if device_type not in (None, report.device_type):
        raise BackendError(f"backend {name!r} is for {report.device_type}, not for {device_type}")
    _check_options(name, backend, options)
    try:
        return backend(**options)  # type: ignore[arg-type]  # the backend's own to check
    except Exception as error:
        raise BackendError(f"backend {name!r} cannot be used: {_one_line(error)}") from error


def _check_options(name: str, backend: type[Backend], options: Mapping[str, object]) -> None:
    parameters = signature(backend).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.name != "streams"]
    for option in options.keys() - {"streams", *known}:
        nearest = "".join(f" Did you mean {match!r}?" for match in get_close_matches(option, known, n=1))
        takes = ", ".join(known) or "none"
        raise BackendError(f"backend {name!r} takes no option {option!r}.{nearest} It takes: {takes}")


def _installed() -> dict[str, list[EntryPoint]]:
    """Entry points by name, in alphabetical order; several under one name when several packages offer it."""
    from stevedore import (
        NamedExtensionManager,
    )  # late: takes 50 ms, and many processes need only the contract

    lister: NamedExtensionManager[Backend] = NamedExtensionManager(
        NAMESPACE, names=[]
    )  # so that none is loaded
    installed: dict[str, list[EntryPoint]] = {}
    for entry_point in sorted(lister.list_entry_points(), key=lambda found: (found.name, found.value)):
        installed.setdefault(entry_point.name, []).append(entry_point)
    return installed


def _only_one_for(device_type: str, installed: Mapping[str, list[EntryPoint]]) -> str:
    reports = [_examine(name, offers)[0] for name, offers in installed.items()]
    matching = [report.name for report in reports if report.usable and report.device_type == device_type]
    if len(matching) > 1:
        raise BackendError(
            f"{len(matching)} backends are for {device_type}: name one of {', '.join(matching)}"
        )
    if not matching:
        others = "; ".join(
            f"{report.name} ({report.device_type or '?'}): {report.reason}" for report in reports
        )
        raise BackendError(f"no usable backend for {device_type!r}. Installed: {others or 'none'}")
    return matching[0]


def _examine(name: str, offers: Sequence[EntryPoint]) -> tuple[BackendReport, type[Backend] | None]:
    """A report and, if it is usable, the class. Loaded one by one: stevedore gives up at an assertion."""
    offer, *duplicates = offers
    if duplicates:
        places = ", ".join(duplicate.value for duplicate in offers)
        return BackendReport(
            name, "", "", False, f"offered {len(offers)} times ({places}): uninstall one"
        ), None
    try:
        import_torch()
        backend = offer.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return BackendReport(name, "", "", False, f"{offer.value} fails to import: {_one_line(error)}"), None
    try:
        fault = _fault(backend)
    except (Exception, SystemExit) as error:  # of attributes that the class computes
        fault = f"cannot be looked at: {_one_line(error)}"
    if fault is not None:
        return BackendReport(name, "", "", False, f"{offer.value} {fault}"), None
    identity = name, backend.device_type, backend.collective
    try:
        report = BackendReport(*identity, *_checked(backend.availability()))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        report = BackendReport(*identity, False, f"{offer.value}.availability() fails: {_one_line(error)}")
    return report, backend if report.usable else None


def _checked(here: object) -> tuple[bool, str, dict[str, str]]:
    """What `availability` says, as text; raises TypeError for what is no answer."""
    if not isinstance(here, Availability):
        raise TypeError(f"expected an Availability, got {here!r}")
    if not isinstance(here.usable, bool):
        raise TypeError(f"expected usable to be True or False, got {here.usable!r}")
    if not isinstance(here.reason, str):
        raise TypeError(f"expected reason to be text, got {here.reason!r}")
    if not isinstance(here.versions, Mapping):
        raise TypeError(f"expected versions to be a mapping, got {here.versions!r}")
    versions = {str(name): str(version) for name, version in here.versions.items()}
    return here.usable, " ".join(here.reason.split()) or "no reason given", versions


def _fault(backend: object) -> str | None:
    """Why what an entry point names is no backend for this release; None if it is one."""
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        return "is not a subclass of eplb_platform.backend.Backend"
    if backend.contract_version != CONTRACT_VERSION:
        return f"is written for version {backend.contract_version!r} of the contract, not {CONTRACT_VERSION}"
    if isabstract(backend):
        return f"lacks {', '.join(sorted(backend.__abstractmethods__))}"
    missing = [
        attribute
        for attribute in ("device_type", "collective")
        if not isinstance(getattr(backend, attribute, None), str)
    ]
    return f"lacks {', '.join(missing)}" if missing else None


def _one_line(error: BaseException) -> str:
    try:
        message = " ".join(str(error).split())
    except Exception as fault:
        message = f"(its message cannot be had: {type(fault).__name__})"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
