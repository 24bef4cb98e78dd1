"""Weights in a format of the device's own (NZ and its like): whole tensors only, and never as raw bytes.

Such a tensor lies in blocks: its storage is larger than its elements (30 x 50 in float16: 2,048 elements), a
slice of it is no memory of its own, and torch's strides say nothing about it. On its way through host memory
it is converted to the plain format and back; on the device it is copied whole.

`copy_` from a plain tensor into one of these is never used: as torch_npu's source has it, on CANN 9.1 and
later it converts the target instead of the source, and gives it a new storage. Only `npu_format_cast`
converts, into a tensor of its own, and what it gives is looked at: where `allow_internal_format` of
`torch.npu.config` is off, or the tensor is a view, it leaves the format as it was, with a warning at most.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from eplb_backends.accelerator.weights import DenseLayout
from eplb_platform.backend import StreamOperations

PLAIN_FORMATS = frozenset({-1, 0, 1, 2, 16, 27, 30, 35, 47})
"""ACL formats that lie in memory as torch describes them (UNDEFINED, NCHW, NHWC, ND, HWCN, NDHWC, NCDHW, NC,
NCL). Every other one is the device's own.
"""

_ND = 2


class FormatOperators(Protocol):
    """What is used of torch_npu."""

    def get_npu_format(self, tensor: torch.Tensor, /) -> int: ...

    def get_storage_size(self, tensor: torch.Tensor, /) -> int: ...

    def npu_format_cast(self, tensor: torch.Tensor, acl_format: int, /) -> torch.Tensor: ...


class NzLayout(DenseLayout):
    """The bytes of weights as the plain format has them, the same for the same values in every format.

    A tensor in a format of the device's own needs a plain copy of it, and a passing second one, for as long
    as its message is under way.
    """

    def as_enqueued(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """HCCL sends the storage of a tensor in a format of the device's own as it lies, with its padding."""
        if not is_internal(tensor):
            return super().as_enqueued(tensor)
        check_whole(tensor)
        return tensor.detach()

    def to_send(self, streams: StreamOperations, tensor: torch.Tensor) -> torch.Tensor:
        if not is_internal(tensor):
            return super().to_send(streams, tensor)
        check_whole(tensor)
        plain = _plain_like(tensor)
        streams.copy(plain, tensor.detach())
        return _octets(plain)

    def to_fill(self, tensor: torch.Tensor) -> torch.Tensor:
        if not is_internal(tensor):
            return super().to_fill(tensor)
        check_whole(tensor)
        return _octets(_plain_like(tensor))

    def fill(self, streams: StreamOperations, tensor: torch.Tensor, octets: torch.Tensor) -> None:
        if not is_internal(tensor):
            super().fill(streams, tensor, octets)
            return
        plain = octets.view(tensor.dtype).view(tensor.shape)
        streams.copy(tensor.detach(), _converted(plain, like=tensor))


def is_internal(tensor: torch.Tensor) -> bool:
    """Whether the tensor is in a format of the device's own."""
    return format_of(tensor) not in PLAIN_FORMATS


def format_of(tensor: torch.Tensor) -> int:
    """The ACL format of the storage that the tensor is in."""
    return int(_torch_npu().get_npu_format(tensor))


def stored_elements(tensor: torch.Tensor) -> int:
    """Elements of its storage with the padding: what HCCL sends for it, and what it takes of memory."""
    return int(_torch_npu().get_storage_size(tensor)) if is_internal(tensor) else tensor.numel()


def check_whole(tensor: torch.Tensor) -> None:
    """Raise `ValueError` for a view or slice of a tensor in a format of the device's own."""
    if not is_internal(tensor):
        return
    base = tensor._base  # of a detached tensor it has the same shape; in inference mode there is none
    is_part = base is not None and base.shape != tensor.shape
    if is_part or tensor.storage_offset() or not tensor.is_contiguous() or _exceeds(tensor):
        raise ValueError(
            f"a view {list(tensor.shape)} (offset {tensor.storage_offset()}) of a tensor in ACL format "
            f"{format_of(tensor)} is no memory of its own and can be neither sent nor staged: keep one "
            "tensor for each expert"
        )


def check_parameter(parameter: Sequence[torch.Tensor] | torch.Tensor) -> None:
    """Raise `ValueError` for weights that cannot be moved expert by expert, with the way out of it."""
    if isinstance(parameter, torch.Tensor):
        if is_internal(parameter):
            raise ValueError(
                f"a stacked parameter {list(parameter.shape)} in ACL format {format_of(parameter)} has no "
                "experts that can be moved: replace it by split_stacked(parameter), which needs up to "
                f"{conversion_bytes(parameter) / 2**20:.1f} MiB more while it runs"
            )
        return
    kinds = {(format_of(expert), stored_elements(expert)) for expert in parameter}
    if len(kinds) > 1:
        raise ValueError(f"experts of one parameter differ in (ACL format, stored elements): {sorted(kinds)}")
    for expert in parameter:
        check_whole(expert)


def check_same_format(target: torch.Tensor, source: torch.Tensor, what: str) -> None:
    """Raise `ValueError` unless one can be copied into the other as it lies in memory."""
    formats = format_of(target), format_of(source)
    sizes = stored_elements(target), stored_elements(source)
    if (is_internal(target) or is_internal(source)) and (formats[0] != formats[1] or sizes[0] != sizes[1]):
        raise ValueError(
            f"{what}: ACL format {formats[1]} with {sizes[1]} stored elements does not go into format "
            f"{formats[0]} with {sizes[0]}; are weights converted after start, or is "
            "torch.npu.config.allow_internal_format off?"
        )


def split_stacked(parameter: torch.Tensor) -> list[torch.Tensor]:
    """One tensor for each expert of a stacked parameter [slots, ...], in the format that the stack has.

    Waits for nothing. Needs `conversion_bytes(parameter)` more memory than the stack has already; once the
    caller has given up the stack, the experts take what the stack took, and their padding.
    """
    if not is_internal(parameter):
        return [expert.detach().clone() for expert in parameter]
    check_whole(parameter)
    acl_format = format_of(parameter)
    plain = _torch_npu().npu_format_cast(parameter.detach(), _ND)
    # Cloned first: torch_npu leaves a view as it is when it is asked to convert it.
    return [_in_format(expert.clone(), acl_format) for expert in plain]


def conversion_bytes(parameter: torch.Tensor) -> int:
    """Bytes that `split_stacked` needs at its height: the experts, and of a stack in a format of the device's
    own a plain copy and one plain expert.
    """
    stored = stored_elements(parameter) * parameter.element_size()
    if not is_internal(parameter):
        return stored
    return stored + parameter.nbytes + parameter.nbytes // max(parameter.shape[0], 1)


def _converted(plain: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    converted = _in_format(plain, format_of(like))
    check_same_format(like, converted, "weights that were received")
    return converted


def _in_format(plain: torch.Tensor, acl_format: int) -> torch.Tensor:
    converted = _torch_npu().npu_format_cast(plain, acl_format)
    if format_of(converted) != acl_format:
        raise ValueError(
            f"torch_npu left {list(plain.shape)} {plain.dtype} in ACL format {format_of(converted)} instead "
            f"of {acl_format}: set torch.npu.config.allow_internal_format = True before the model is loaded"
        )
    return converted


def _exceeds(tensor: torch.Tensor) -> bool:
    """Whether the storage holds more than the tensor can need with the widest blocks there are (32 x 64)."""
    *stacked, rows, columns = (1, *tensor.shape) if tensor.dim() == 1 else tensor.shape
    return stored_elements(tensor) > math.prod(stacked) * _up_to(rows, 32) * _up_to(columns, 64)


def _up_to(length: int, block: int) -> int:
    return -(-length // block) * block


def _plain_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _octets(plain: torch.Tensor) -> torch.Tensor:
    return plain.view(-1).view(torch.uint8)


def _torch_npu() -> FormatOperators:
    return cast(FormatOperators, importlib.import_module("torch_npu"))
