"""What a case leaves to the device, which is judged in what it declares: its dtype, and the head_dim of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from anychip.plugin_api import Capabilities
from anychip.types import DType

if TYPE_CHECKING:
    from anychip_conformance.device import Device

CaseDtype = Literal["any", "narrow", "float32", "bfloat16", "float16"]
"""any: the widest that the device declares; narrow: the narrowest."""

DTYPES = ("float32", "bfloat16", "float16")
_BY_WIDTH: tuple[DType, ...] = ("float32", "float16", "bfloat16")
C = TypeVar("C", bound=msgspec.Struct)


def each_dtype(*cases: C) -> list[C]:
    """Every case in every dtype to compute in, one case after the other."""
    return [msgspec.structs.replace(case, dtype=dtype) for case in cases for dtype in DTYPES]


def seeded(params: C, seed: int) -> C:
    """The same case with values of another seed, where it has one."""
    return msgspec.structs.replace(params, seed=seed) if seed and hasattr(params, "seed") else params


def widest(capabilities: Capabilities) -> DType:
    return next(dtype for dtype in _BY_WIDTH if dtype in capabilities.dtypes)


def narrowest(capabilities: Capabilities) -> DType:
    return next(dtype for dtype in reversed(_BY_WIDTH) if dtype in capabilities.dtypes)


def resolved(params: C, device: Device) -> C:
    """The same case in a dtype and with a head_dim of the device, where it left the choice."""
    changes: dict[str, object] = {}
    choose = {"any": widest, "narrow": narrowest}.get(getattr(params, "dtype", ""))
    if choose is not None:
        changes["dtype"] = choose(device.capabilities)
    if getattr(params, "any_head_dim", False):
        wanted, there = params.head_dim, device.capabilities.head_dims  # type: ignore[attr-defined]
        if there is not None and wanted not in there:
            changes["head_dim"] = min(there, key=lambda dim: (abs(dim - wanted), dim))
    return msgspec.structs.replace(params, **changes) if changes else params
