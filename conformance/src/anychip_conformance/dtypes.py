"""Dtypes of cases. A case names one, or leaves the choice to the device, which is judged in what it declares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from anychip.plugin_api import Capabilities
from anychip.types import DType

if TYPE_CHECKING:
    from anychip_conformance.device import Device

CaseDtype = Literal["any", "narrow", "float32", "bfloat16", "float16"]
"""any: the widest that the device declares; narrow: the narrowest."""

_BY_WIDTH: tuple[DType, ...] = ("float32", "float16", "bfloat16")
C = TypeVar("C", bound=msgspec.Struct)


def widest(capabilities: Capabilities) -> DType:
    return next(dtype for dtype in _BY_WIDTH if dtype in capabilities.dtypes)


def narrowest(capabilities: Capabilities) -> DType:
    return next(dtype for dtype in reversed(_BY_WIDTH) if dtype in capabilities.dtypes)


def resolved(params: C, device: Device) -> C:
    """The same case in a dtype of the device, where it left the choice."""
    choose = {"any": widest, "narrow": narrowest}.get(getattr(params, "dtype", ""))
    return params if choose is None else msgspec.structs.replace(params, dtype=choose(device.capabilities))
