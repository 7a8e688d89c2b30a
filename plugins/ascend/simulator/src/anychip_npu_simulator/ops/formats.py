"""npu_format_cast: the layout in which a weight lies. Source: _op_plugin_docs.py, npu_format_cast; the number 29 is
FRACTAL_NZ of the vendor's Format."""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

from anychip_npu_simulator import graphs, tally
from anychip_npu_simulator.errors import Refused
from anychip_npu_simulator.machine import machine
from anychip_npu_simulator.memory import FRACTAL_NZ, host, is_nz

_NAME = "npu::npu_format_cast"
_ND = 2
_NZ_DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.int32)
"""The matrix unit reads tiles of these; int32 carries eight int4. float32 weights stay ND."""


def format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """A copy in the layout. The wheel has no meta function for it."""
    if acl_format not in (_ND, FRACTAL_NZ):
        raise Refused(_NAME, "acl_format", acl_format, f"{_ND} (ND) or {FRACTAL_NZ} (FRACTAL_NZ)")
    if customize_dtype is not None or input_dtype is not None:
        raise Refused(_NAME, "customize_dtype", customize_dtype, "None in this simulator")
    if graphs.active():
        raise graphs.host_read(_NAME)
    if acl_format == FRACTAL_NZ:
        if input.dim() < 2:
            raise Refused(_NAME, "input", f"of shape {tuple(input.shape)}", "two or more dimensions")
        if input.dtype not in _NZ_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in _NZ_DTYPES)
            raise Refused(_NAME, "input", input.dtype, f"{names} for FRACTAL_NZ")
        if torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT") != b"enable":
            # On a device the weight silently stays as it is. On a 950 the wheel lets nobody turn the switch on.
            switch = "with torch.npu.config.allow_internal_format = True"
            allowed = f"{_ND} (ND) on a 950" if machine().generation == "950" else f"{acl_format} {switch}"
            raise Refused(_NAME, "acl_format", acl_format, allowed)
        out = torch_npu.empty_with_format(input.shape, dtype=input.dtype, device=input.device, acl_format=FRACTAL_NZ)
    else:
        out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    host(out).copy_(host(input))
    tally.add(_NAME, confirmed=False)
    return out


def format_cast_like(
    input: Tensor, dst: Tensor, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Any:
    return format_cast(input, FRACTAL_NZ if is_nz(dst) else _ND)
