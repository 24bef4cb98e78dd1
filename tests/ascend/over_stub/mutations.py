"""Every wait for an event, check of NZ and check of an option in the Ascend backend, and how to remove it.

A scenario of `scenarios.py` must notice each. A line stands here as it does in the source, inside `function`:
when the source changes, `test_mutations.py` says which entry has to follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from types import CodeType, FunctionType


@dataclass(frozen=True)
class Mutation:
    """One line of a function (or of `Class.method`) of `module`, `line`, replaced by `broken`."""

    module: str
    function: str
    line: str
    broken: str
    scenario: str
    """The one that notices."""

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.function}: {self.line} -> {self.broken}"


STREAMS = "eplb_backends.accelerator.streams"
WEIGHTS = "eplb_backends.accelerator.weights"
HOST = "eplb_backends.accelerator.host_transfer"
COLLECTIVE = "eplb_backends.accelerator.collective_transfer"
GROUP = "eplb_backends.ascend.hccl_group"
BACKEND = "eplb_backends.ascend.backend"
NZ = "eplb_backends.ascend.nz_format"
OPTIONS = "eplb_backends.ascend.hccl_options"

_WHOLE = "if is_part or tensor.storage_offset() or not tensor.is_contiguous() or _exceeds(tensor):"
_SAME = (
    "if (is_internal(target) or is_internal(source)) and (formats[0] != formats[1] or sizes[0] != sizes[1]):"
)

WAITS = (
    Mutation(
        STREAMS,
        "TorchStreams.wait",
        "self._module.current_stream().wait_event(_event(mark))",
        "pass",
        "swap of a stack by the host",
    ),
    Mutation(
        STREAMS, "TorchStreams.passed", "return _event(mark).query()", "return True", "swap of NZ by the host"
    ),
    Mutation(
        STREAMS,
        "TorchStreams.keep",
        "tensor.record_stream(self._module.current_stream())",
        "pass",
        "memory given back while it is read",
    ),
    Mutation(
        STREAMS,
        "EventTimer.elapsed_ms",
        "if started is None or stopped is None or not (started.query() and stopped.query()):",
        "if started is None or stopped is None:",
        "a timer on a stream that dawdles",
    ),
    Mutation(
        STREAMS,
        "wait_on_host",
        "while not streams.passed(mark):",
        "while False:",
        "swap of a stack by the host",
    ),
    Mutation(
        WEIGHTS,
        "_on_host",
        "if not wait_on_host(streams, streams.record(), time.monotonic() + timeout_s):",
        "if False:",
        "swap of a stack by HCCL",
    ),
    Mutation(
        HOST,
        "HostTransfer._await",
        "if not wait_on_host(self._streams, half.filled, deadline):",
        "if False:",
        "swap of a stack by the host",
    ),
    Mutation(
        HOST,
        "HostTransfer._quiet",
        "wait_on_host(self._streams, self._streams.record(), time.monotonic() + _QUIET_S)",
        "pass",
        "an exchange that fails while its copies are pending",
    ),
    Mutation(
        HOST,
        "HostTransfer.stop",
        "wait_on_host(self._streams, written, time.monotonic() + _QUIET_S)",
        "pass",
        "an abort by the host",
    ),
    Mutation(
        COLLECTIVE,
        "CollectiveTransfer.stop",
        "wait_on_host(self._streams, written, time.monotonic() + _QUIET_S)",
        "pass",
        "an abort by HCCL",
    ),
    Mutation(
        COLLECTIVE,
        "CollectiveTransfer.wait",
        "if self._written is None or "
        "wait_on_host(self._streams, self._written, time.monotonic() + timeout_s):",
        "if True:",
        "an exchange that nobody answers",
    ),
    Mutation(GROUP, "HcclGroup.exchange", "work.synchronize()", "pass", "swap of NZ by HCCL"),
)
"""And what keeps memory until an event has passed."""

REFUSALS = "refusals"

NZ_CHECKS = (
    Mutation(NZ, "NzLayout.as_enqueued", "check_whole(tensor)", "pass", REFUSALS),
    Mutation(NZ, "NzLayout.to_send", "check_whole(tensor)", "pass", REFUSALS),
    Mutation(NZ, "NzLayout.to_fill", "check_whole(tensor)", "pass", REFUSALS),
    Mutation(NZ, "check_whole", _WHOLE, _WHOLE.replace("is_part or ", ""), REFUSALS),
    Mutation(NZ, "check_whole", _WHOLE, _WHOLE.replace("tensor.storage_offset() or ", ""), REFUSALS),
    Mutation(NZ, "check_whole", _WHOLE, _WHOLE.replace("not tensor.is_contiguous() or ", ""), REFUSALS),
    Mutation(NZ, "check_whole", _WHOLE, _WHOLE.replace(" or _exceeds(tensor)", ""), REFUSALS),
    Mutation(NZ, "check_parameter", "if is_internal(parameter):", "if False:", REFUSALS),
    Mutation(NZ, "check_parameter", "if len(kinds) > 1:", "if False:", REFUSALS),
    Mutation(NZ, "check_parameter", "check_whole(expert)", "pass", REFUSALS),
    Mutation(NZ, "check_same_format", _SAME, _SAME.replace("formats[0] != formats[1] or ", ""), REFUSALS),
    Mutation(NZ, "check_same_format", _SAME, _SAME.replace(" or is_internal(source)", ""), REFUSALS),
    Mutation(NZ, "check_same_format", _SAME, _SAME.replace(" or sizes[0] != sizes[1]", ""), REFUSALS),
    Mutation(NZ, "split_stacked", "check_whole(parameter)", "pass", REFUSALS),
    Mutation(
        NZ, "_converted", 'check_same_format(like, converted, "weights that were received")', "pass", REFUSALS
    ),
    Mutation(NZ, "_in_format", "if format_of(converted) != acl_format:", "if False:", REFUSALS),
    Mutation(
        BACKEND,
        "AscendBackend.allocate_staging",
        "nz_format.check_parameter(parameter)",
        "pass",
        REFUSALS,
    ),
    Mutation(
        BACKEND,
        "AscendBackend.allocate_staging",
        'nz_format.check_same_format(parameter[0], staged, "staging")',
        "pass",
        REFUSALS,
    ),
    Mutation(
        BACKEND,
        "AscendBackend.swap_in",
        'nz_format.check_same_format(parameter[slot], staging[row], f"staged expert for slot {slot}")',
        "pass",
        REFUSALS,
    ),
)

OPTION_CHECKS = (
    Mutation(OPTIONS, "HcclOptions.__init__", "if faults:", "if False:", REFUSALS),
    Mutation(OPTIONS, "_fault", "if name not in KNOWN:", "if False:", REFUSALS),
    Mutation(OPTIONS, "_fault", "fault = KNOWN[name].fault(value)", "fault = None", REFUSALS),
    Mutation(OPTIONS, "_fault", "int(str(value)) % 4", "False", REFUSALS),
    Mutation(OPTIONS, "_Whole.fault", "type(value) is int and ", "", REFUSALS),
    Mutation(OPTIONS, "_Whole.fault", "self.least <= value", "value <= value", REFUSALS),
    Mutation(OPTIONS, "_Whole.fault", "value <= self.most", "value <= value", REFUSALS),
    Mutation(OPTIONS, "_Text.fault", "isinstance(value, str) and ", "", REFUSALS),
    Mutation(OPTIONS, "_Text.fault", "0 < len(value.encode())", "0 <= len(value.encode())", REFUSALS),
    Mutation(OPTIONS, "_Text.fault", " < self.size", "", REFUSALS),
    Mutation(
        BACKEND,
        "AscendBackend.attach",
        "check_outlasts(self._hccl_options, timeout_s)",
        "pass",
        REFUSALS,
    ),
    Mutation(
        OPTIONS,
        "check_outlasts",
        'os.environ.get(_EXEC_TIMEOUT, "")',
        '""',
        REFUSALS,
    ),
    Mutation(BACKEND, "AscendBackend.__init__", "if routing not in ROUTINGS:", "if False:", REFUSALS),
    Mutation(
        BACKEND,
        "AscendBackend.__init__",
        'check_has_effect("ascend", "HCCL", self._hccl_options.values, self.transport)',
        "pass",
        REFUSALS,
    ),
    Mutation(
        BACKEND,
        "AscendBackend.__init__",
        'check_nothing_waits("ascend", hccl_group.BLOCKING_WAIT)',
        "pass",
        REFUSALS,
    ),
)

MUTATIONS = (*WAITS, *NZ_CHECKS, *OPTION_CHECKS)


@contextmanager
def mutated(mutation: Mutation | None) -> Iterator[None]:
    """The function has the broken line in it, for whoever has it already too. None: all is as it was."""
    if mutation is None:
        yield
        return
    function = _function(mutation)
    code = function.__code__
    function.__code__ = _broken_code(function, mutation)
    try:
        yield
    finally:
        function.__code__ = code


def _function(mutation: Mutation) -> FunctionType:
    found = reduce(getattr, mutation.function.split("."), import_module(mutation.module))
    function = inspect.unwrap(found)  # type: ignore[arg-type]
    if not isinstance(function, FunctionType):
        raise TypeError(f"{mutation.module}.{mutation.function} is no function of Python")
    return function


def _broken_code(function: FunctionType, mutation: Mutation) -> CodeType:
    source = inspect.getsource(function)
    if source.count(mutation.line) != 1:
        raise ValueError(f"{mutation}: the line stands there {source.count(mutation.line)} times")
    module = import_module(mutation.module)
    whole = inspect.getsource(module).replace(source, source.replace(mutation.line, mutation.broken))
    (code,) = _codes(compile(whole, str(module.__file__), "exec", dont_inherit=True), mutation.function)
    return code


def _codes(within: CodeType, name: str) -> Iterator[CodeType]:
    for constant in within.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_qualname == name:
                yield constant
            yield from _codes(constant, name)
