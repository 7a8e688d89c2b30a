"""The few things of torch_npu that torch does not name, in one place. Imported when a platform is opened, after core
has imported torch_npu (PlatformManifest.runtime_imports)."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import torch
from torch import Tensor

npu: Final[Any] = torch.ops.npu
"""The vendor's ops. A call with a wrong keyword ends in the vendor's own schema."""

FORMAT_ND, FORMAT_NZ = 2, 29
"""Numbers of layouts: plain, and blocks of 16 rows by 32 bytes (FRACTAL_NZ), as the matrix units read them."""

TYPE_NUMBERS = {torch.float16: 5, torch.bfloat16: 15}
"""torch's own numbers of dtypes (c10::ScalarType), as schemas with `int? output_dtype` take them."""

_ACL = "libascendcl.so"
_OK = 0


def device_module() -> Any:
    """torch.npu, which torch_npu adds when it is imported."""
    return torch.npu  # type: ignore[attr-defined]


def allow_internal_formats(allowed: bool) -> None:
    """A runtime option of the vendor's. With it the wheel takes some ops through its older operators, which no graph
    holds; without it npu_format_cast leaves weights in the plain layout. So it is on while weights are cast."""
    device_module().config.allow_internal_format = allowed


def to_nz(weight: Tensor) -> Tensor:
    """The same numbers in FRACTAL_NZ. Shape and dtype stay; strides mean nothing any more."""
    allow_internal_formats(True)
    try:
        return npu.npu_format_cast(weight.contiguous(), FORMAT_NZ)
    finally:
        allow_internal_formats(False)


def to_nd(weight: Tensor) -> Tensor:
    return npu.npu_format_cast(weight, FORMAT_ND)


def without_ownership(tensor: Tensor) -> Tensor:
    """The same memory, which this tensor does not keep from being used again: whoever has it knows who does."""
    from torch_npu._C import _weak_ref_tensor

    alias: Tensor = _weak_ref_tensor(tensor)
    return alias


def streams_left() -> int | None:
    """Streams that this device can still give to the process, as the runtime says; None where it does not."""
    try:
        ask = ctypes.CDLL(_ACL).aclrtGetStreamAvailableNum
    except (OSError, AttributeError):
        return None
    count = ctypes.c_uint32()
    return int(count.value) if ask(ctypes.byref(count)) == _OK else None
