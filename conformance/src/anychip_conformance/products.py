"""Weights for linear and MoE kernels: canonical values of every scheme, loaded as core streams them, and what they
stand for in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import FP8_MAX, INT4_ZERO, NAMED, VALUES, QuantScheme
from anychip.types import cdiv
from anychip_conformance.device import Device, seen
from anychip_conformance.oracle.rounding import FP8_SMALLEST_STEP, FP8_UNIT, UNIT_ROUNDOFF, gamma

CHUNK_ROWS = 64
"""Rows of one call of load, as LinearKernel.load promises; the last may have fewer."""
_INT8_MAX = 127.0
_TINY_SCALE = 1e-12


class Scheme(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """QuantScheme as parameters of a case: the named one with other sizes. `zero_points`: integers."""

    name: str
    scales: str
    group_size: int | None = None
    zero_points: bool = False
    activations: str = "plain"

    @property
    def spec(self) -> QuantScheme:
        named = NAMED[self.name]
        return replace(
            named,
            scales=self.scales,
            group_size=self.group_size,
            zero_points="int" if self.zero_points else named.zero_points,
            activations=self.activations,
        )


SCHEMES = (
    Scheme(name="int8", scales="channel"),
    Scheme(name="int8", scales="tensor"),
    Scheme(name="int8", scales="group", group_size=32),
    Scheme(name="int4", scales="group", group_size=32),
    Scheme(name="int4", scales="group", group_size=16, zero_points=True),
    Scheme(name="int4", scales="group", group_size=64, zero_points=True),  # groups as wide as kernels like them
    Scheme(name="fp8", scales="tensor", activations="static"),
    Scheme(name="fp8", scales="channel", activations="token"),
    Scheme(name="fp8", scales="block", group_size=32, activations="group"),
    Scheme(name="int8-w8a8", scales="channel", activations="token"),
)
"""One of every form of bytes, nibbles and float32 scales that a checkpoint's container is turned into."""

FORMATS = (
    Scheme(name="fp8-w8a16", scales="channel"),
    Scheme(name="fp8-w8a16", scales="block", group_size=32),
    Scheme(name="mxfp4", scales="group", group_size=32),
    Scheme(name="nvfp4", scales="group", group_size=16),
    Scheme(name="int4-float-zeros", scales="group", group_size=32),
    Scheme(name="codebook4", scales="group", group_size=32),
)
"""Weights alone, of other values, scales and zeros."""

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_E8M0_BIAS = 127


@dataclass(slots=True)
class Matrix:
    """`parts` by kind: "" for values, ".scale", ".global_scale", ".zero", ".input_scale". `dense` is what they stand
    for."""

    parts: dict[str, Tensor]
    dense: np.ndarray
    input_scale: float | None = None


def make_matrix(
    device: Device, rng: np.random.Generator, rows: int, columns: int, dtype: str, scheme: Scheme | None
) -> Matrix:
    """Random canonical weights. Scales of rows and of columns differ widely: one cannot pass for the other."""
    if scheme is None:
        weight = device.held(rng.normal(size=(rows, columns)) / columns**0.5, dtype)
        return Matrix({"": weight}, seen(weight))
    spec = scheme.spec
    if spec.bits == 4:
        raw = rng.integers(0, 16, (rows, columns)).astype(float)
    elif spec.values == "fp8_e4m3":
        raw = np.clip(rng.normal(size=(rows, columns)) * 60, -FP8_MAX, FP8_MAX)
    else:
        raw = rng.integers(-127, 128, (rows, columns)).astype(float)
    values = device.held(raw, VALUES[spec.values].dtype)
    shape = scale_shape(scheme, rows, columns)
    spread = {"int4": 8.0, "fp8_e4m3": 60.0, "fp4_e2m1": 3.0, "codebook": 0.5}.get(spec.values, 64.0)
    parts, factor = make_scales(device, rng, spec, shape, spread * columns**0.5)
    parts = {"": values, **parts}
    zero = np.zeros(1)
    if spec.zero_points == "float":
        parts[".zero"] = device.held(rng.uniform(-4, 19, shape), "float32")
        zero = spread_out(seen(parts[".zero"]), scheme, rows, columns)
    elif scheme.zero_points:
        parts[".zero"] = device.held(rng.integers(4, 12, shape), "uint8")
        zero = spread_out(seen(parts[".zero"]), scheme, rows, columns)
    elif spec.values == "int4":
        zero = np.full(1, float(INT4_ZERO))
    dense = (stored_numbers(spec, values) - zero) * spread_out(factor, scheme, rows, columns)
    matrix = Matrix(parts, dense)
    if scheme.activations == "static":
        matrix.input_scale = float(np.float32(4.0 / FP8_MAX))
        parts[".input_scale"] = device.held([matrix.input_scale], "float32")
    return matrix


def make_scales(
    device: Device, rng: np.random.Generator, spec: QuantScheme, shape: tuple[int, ...], spread: float
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Random canonical scales for values of about `spread`, and what they stand for."""
    wanted = 2.0 ** rng.integers(-3, 3, shape) / spread
    if spec.scale_format == "e8m0":
        exponent = np.round(np.log2(wanted))
        return {".scale": device.held(exponent + _E8M0_BIAS, "uint8")}, 2.0**exponent
    wanted = wanted * rng.uniform(0.7, 1.3, shape)
    if spec.scale_format == "float32":
        scale = device.held(wanted, "float32")
        return {".scale": scale}, seen(scale)
    whole = device.held([wanted.max() / FP8_MAX * rng.uniform(1.0, 1.3)], "float32")
    scale = device.held(wanted / seen(whole), "float8_e4m3fn")
    return {".scale": scale, ".global_scale": whole}, seen(scale.to("cpu").float()) * seen(whole)


def stored_numbers(spec: QuantScheme, values: Tensor) -> np.ndarray:
    """What canonical values stand for, before zeros and scales."""
    if spec.values == "fp4_e2m1":
        return _E2M1[seen(values).astype(int)]
    if spec.codebook:
        return np.array(spec.codebook)[seen(values).astype(int)]
    return seen(values.to("cpu").float()) if spec.values == "fp8_e4m3" else seen(values)


def scale_shape(scheme: Scheme, rows: int, columns: int) -> tuple[int, ...]:
    size = scheme.group_size or 1
    return {
        "tensor": (1,),
        "channel": (rows,),
        "group": (rows, cdiv(columns, size)),
        "block": (cdiv(rows, size), cdiv(columns, size)),
    }[scheme.scales]


def spread_out(scale: np.ndarray, scheme: Scheme, rows: int, columns: int) -> np.ndarray:
    """Scales or zeros at every element's place."""
    if scheme.scales == "tensor":
        return scale.reshape(1, 1)
    if scheme.scales == "channel":
        return scale.reshape(-1, 1)
    assert scheme.group_size is not None
    wide = scale.repeat(scheme.group_size, axis=1)[:, :columns]
    return wide if scheme.scales == "group" else wide.repeat(scheme.group_size, axis=0)[:rows]


class Loads(Protocol):
    def __call__(self, part: str, tensor: Tensor, *, row: int = 0) -> None: ...


def stream(matrix: Matrix, name: str, load: Loads) -> None:
    """Loads a part as core does: rows in chunks whose storage is reused, then the rest whole."""
    values = matrix.parts[""]
    buffer = torch.empty_like(values[:CHUNK_ROWS])
    for row in range(0, len(values), CHUNK_ROWS):
        chunk = values[row : row + CHUNK_ROWS]
        buffer = buffer[: len(chunk)]
        buffer.copy_(chunk)
        load(name, buffer, row=row)
        if values.dtype.is_floating_point and values.element_size() > 1:
            buffer.fill_(float("nan"))  # it is the caller's again
    for kind, tensor in matrix.parts.items():
        if kind:
            load(name + kind, tensor)


@dataclass(frozen=True, slots=True)
class Slack:
    """What a scheme may cost beyond a dense product: the absolute error of activations by element, and the relative
    one of weights that are dequantized to the dtype first."""

    dx: np.ndarray | float
    dw: float


def scheme_slack(x: np.ndarray, scheme: Scheme | None, dtype: str, input_scale: float | None) -> Slack:
    """Activations are rounded to nearest: half a step of int8, half a unit of fp8, and what lies beyond a static range
    is cut off."""
    if scheme is None:
        return Slack(0.0, 0.0)
    dw = 2 * UNIT_ROUNDOFF[dtype]
    if scheme.activations == "plain":
        return Slack(0.0, dw)
    if scheme.activations == "static":
        assert input_scale is not None
        cut = np.maximum(np.abs(x) - FP8_MAX * input_scale, 0.0)
        return Slack(cut + np.abs(x) * (FP8_UNIT + gamma(4)) + FP8_SMALLEST_STEP * input_scale, dw)
    most = _INT8_MAX if scheme.name == "int8-w8a8" else FP8_MAX
    size = scheme.group_size if scheme.activations == "group" and scheme.group_size else x.shape[-1]
    scale = np.empty_like(x)
    for group in range(cdiv(x.shape[-1], size)):
        part = slice(group * size, (group + 1) * size)
        scale[:, part] = np.maximum(np.abs(x[:, part]).max(-1, keepdims=True), _TINY_SCALE) / most
    if scheme.name == "int8-w8a8":
        return Slack(0.5 * scale + np.abs(x) * gamma(6), dw)
    return Slack(np.abs(x) * (FP8_UNIT + gamma(6)) + FP8_SMALLEST_STEP * scale, dw)
