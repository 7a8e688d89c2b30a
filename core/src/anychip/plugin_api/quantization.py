"""Quantization as kernels see it: one canonical form per scheme, whatever container the checkpoint used.

A weight is w = (q - zero) * scale, or with minima w = q * scale - minimum, with q the number that a stored value stands
for. Core turns checkpoints of every container, and plain weights that are quantized at load, into the parts that
LinearKernel.load and FusedMoE.load document; kernels pack those as they like. Sources: Frantar et al., "GPTQ", 2022;
Lin et al., "AWQ", 2023; Micikevicius et al., "FP8 Formats for Deep Learning", 2022; OCP, "Microscaling Formats (MX)
v1.0", 2023; Dettmers et al., "QLoRA", 2023 (NF4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, get_args

from anychip.errors import Unsupported

ValueFormat = Literal["int8", "int6", "int5", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "codebook"]
ScaleFormat = Literal["float32", "float16", "int8", "e8m0", "e4m3"]
ScaleShape = Literal["tensor", "channel", "group", "block"]
ZeroFormat = Literal["int", "float", "minima"]
ActivationScales = Literal["plain", "token", "group", "static"]
ActivationFormat = Literal["int8", "fp8_e4m3"]

_CODEBOOK_SIZES = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How a product's weights are stored, and what happens to its activations. Raises Unsupported where the fields
    contradict each other, naming them. The parts in canonical form:

    | part | dtype | shape |
    |---|---|---|
    | values | one to an element, as VALUES lists them | [rows, in_features] |
    | `.scale` | as SCALES lists them | tensor: [1]; channel: [rows]; group: [rows, groups]; block: [row blocks, column blocks] |
    | `.global_scale`, with e4m3 scales | float32 | [1], multiplies every scale of the part |
    | `.super_scale`, with int8 scales | float16 | [rows, super-groups], multiplies the scales of its groups |
    | `.zero`, with zero points | uint8 for "int", float32 for "float" | as `.scale` |
    | `.minimum`, with minima | that of `.scale` | as `.scale` |
    | `.super_minimum`, with minima and int8 scales | float16 | as `.super_scale`, multiplies the minima |
    | `.input_scale`, with static activations | float32 | [1] |

    Without zero points and minima the zero of int2 to int6 is half their range, and that of others 0. `group_size`
    columns share a scale, and in "block" as many rows do; the last group may be shorter, and so may the last
    super-group. `name` is what people read and devices declare.
    """  # noqa: E501

    values: ValueFormat
    scales: ScaleShape
    group_size: int | None = None
    scale_format: ScaleFormat = "float32"
    super_group_size: int | None = None
    """With int8 scales: the columns that share a super-scale, several groups."""
    zero_points: ZeroFormat | None = None
    """int: 0 to 15, of int4 values. float: any number, of int4 and int8 values. minima: of integers, a number that is
    taken off the product in place of a zero point."""
    codebook: tuple[float, ...] = ()
    """With "codebook" values: the numbers that the indices stand for, 2^n of them."""
    activations: ActivationScales = "plain"
    """plain: not quantized. Otherwise to `activation_format`, symmetrically: with a scale per token, per token and
    group, or the checkpoint's one scale."""
    activation_format: ActivationFormat | None = None
    """None stands for the weights' own where that is int8 or fp8_e4m3 and activations are quantized."""

    name: str = field(init=False, compare=False)
    """What a kernel must know to serve the scheme, as one word: formats of values, scales, zero points and activations,
    and no sizes. Weight-only and activation-quantized forms of the same weights have two names."""
    bits: int = field(init=False, compare=False, repr=False)
    """Of a value; two of at most four bits fit into a byte."""

    def __post_init__(self) -> None:
        if self.activations != "plain" and self.activation_format is None and self.values in ("int8", "fp8_e4m3"):
            object.__setattr__(self, "activation_format", self.values)
        if problems := _problems(self):
            raise Unsupported("quantization scheme", problems)
        bits = (len(self.codebook) - 1).bit_length() if self.codebook else VALUES[self.values].bits
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "name", _name(self))


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A format of values: its canonical dtype, its bits, and the word for it in a scheme's name."""

    dtype: str
    bits: int
    word: str


VALUES: dict[str, StoredValue] = {
    "int8": StoredValue("int8", 8, "int8"),
    "int6": StoredValue("uint8", 6, "int6"),  # 0 to 63, and so on
    "int5": StoredValue("uint8", 5, "int5"),
    "int4": StoredValue("uint8", 4, "int4"),
    "int3": StoredValue("uint8", 3, "int3"),
    "int2": StoredValue("uint8", 2, "int2"),
    "fp8_e4m3": StoredValue("float8_e4m3fn", 8, "fp8"),
    "fp8_e5m2": StoredValue("float8_e5m2", 8, "fp8-e5m2"),
    "fp4_e2m1": StoredValue("uint8", 4, "fp4"),  # 0 to 15: sign, two bits of exponent, one of mantissa
    "codebook": StoredValue("uint8", 8, "codebook"),  # an index
}
"""Formats of values. A byte holds one, whatever their bits are: kernels pack."""


@dataclass(frozen=True, slots=True)
class StoredScale:
    """A format of scales: its canonical dtype, and what it puts before the word for the values."""

    dtype: str
    prefix: str


SCALES: dict[str, StoredScale] = {
    "float32": StoredScale("float32", ""),
    "float16": StoredScale("float16", "f16-"),
    "int8": StoredScale("int8", "super-"),
    "e8m0": StoredScale("uint8", "mx"),  # a byte b is 2^(b - 127); 255 does not occur
    "e4m3": StoredScale("float8_e4m3fn", "nv"),
}
"""Formats of scales."""

_NAMES = {"fp8": "fp8-w8a16", "fp8-w8afp8": "fp8"}
"""Names that differ from what the fields spell: fp8 has meant both sides since interface 0.1."""


def _name(scheme: QuantScheme) -> str:
    value = VALUES[scheme.values].word + (str(scheme.bits) if scheme.codebook else "")
    word = SCALES[scheme.scale_format].prefix + value
    word += {"float": "-float-zeros", "minima": "-minima"}.get(scheme.zero_points or "", "")
    if scheme.activation_format is not None:
        word += f"-w{scheme.bits}a{'fp8' if scheme.activation_format == 'fp8_e4m3' else 8}"
    return _NAMES.get(word, word)


def _problems(scheme: QuantScheme) -> list[str]:
    """Every reason why a scheme cannot be, each of which begins with the field."""
    found = []
    for name, value, choices in (
        ("values", scheme.values, get_args(ValueFormat)),
        ("scales", scheme.scales, get_args(ScaleShape)),
        ("scale_format", scheme.scale_format, get_args(ScaleFormat)),
        ("zero_points", scheme.zero_points, (None, *get_args(ZeroFormat))),
        ("activations", scheme.activations, get_args(ActivationScales)),
        ("activation_format", scheme.activation_format, (None, *get_args(ActivationFormat))),
    ):
        if value not in choices:
            found.append(f"{name} {value!r}: choose one of {', '.join(map(str, choices))}")
    if found:
        return found
    grouped = scheme.scales in ("group", "block")
    if grouped != (scheme.group_size is not None and scheme.group_size > 0):
        found.append(f"group_size {scheme.group_size} with scales by {scheme.scales}")
    found += _super_problems(scheme)
    if scheme.zero_points is not None and scheme.values not in _WITH_ZEROS[scheme.zero_points]:
        taken = " and ".join(_WITH_ZEROS[scheme.zero_points])
        found.append(f"zero_points {scheme.zero_points!r} of {scheme.values} values: only {taken} have such")
    if (scheme.values == "codebook") != bool(scheme.codebook):
        found.append(f"codebook of {len(scheme.codebook)} numbers with {scheme.values} values")
    elif scheme.codebook and len(scheme.codebook) not in _CODEBOOK_SIZES:
        found.append(f"codebook of {len(scheme.codebook)} numbers: 2 to 8 bits count {_CODEBOOK_SIZES}")
    elif not all(map(isfinite, scheme.codebook)):
        found.append("codebook: a number is not finite")
    if (scheme.activations == "plain") != (scheme.activation_format is None):
        found.append(f"activation_format {scheme.activation_format} with activations {scheme.activations!r}")
    elif scheme.activations == "static" and scheme.activation_format != "fp8_e4m3":
        found.append(f"activations 'static' in {scheme.activation_format}: only fp8_e4m3 has one scale for all")
    elif scheme.activations == "group" and not grouped:
        found.append(f"activations 'group' with scales by {scheme.scales}: group_size says how many share one")
    return found


def _super_problems(scheme: QuantScheme) -> list[str]:
    size, group = scheme.super_group_size, scheme.group_size
    if (scheme.scale_format == "int8") != (size is not None):
        return [f"super_group_size {size} with scale_format {scheme.scale_format!r}"]
    if size is not None and (scheme.scales != "group" or not group or size <= 0 or size % group):
        return [f"super_group_size {size} with scales by {scheme.scales} and group_size {group}"]
    return []


_WITH_ZEROS = {"int": ("int4",), "float": ("int4", "int8"), "minima": ("int8", "int6", "int5", "int4", "int3", "int2")}

INT8 = QuantScheme(values="int8", scales="channel")
INT4 = QuantScheme(values="int4", scales="group", group_size=128)
FP8 = QuantScheme(values="fp8_e4m3", scales="channel", activations="token")
FP8_WEIGHTS = QuantScheme(values="fp8_e4m3", scales="channel")
INT8_W8A8 = QuantScheme(values="int8", scales="channel", activations="token")
MXFP4 = QuantScheme(values="fp4_e2m1", scales="group", group_size=32, scale_format="e8m0")
MXFP8 = QuantScheme(values="fp8_e4m3", scales="group", group_size=32, scale_format="e8m0")
NVFP4 = QuantScheme(values="fp4_e2m1", scales="group", group_size=16, scale_format="e4m3")
INT4_FLOAT_ZEROS = QuantScheme(values="int4", scales="group", group_size=64, zero_points="float")
INT8_FLOAT_ZEROS = QuantScheme(values="int8", scales="group", group_size=32, zero_points="float")
NF4 = QuantScheme(
    values="codebook", scales="group", group_size=64,
    codebook=(
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
"""Quantiles of the normal distribution, of greatest magnitude one."""


def _of_gguf(values: ValueFormat, scale: ScaleFormat, size: int, minima: bool = False) -> QuantScheme:
    return QuantScheme(
        values=values, scales="group", group_size=size, scale_format=scale, zero_points="minima" if minima else None,
        super_group_size=256 if scale == "int8" else None, codebook=IQ4 if values == "codebook" else (),
    )  # fmt: skip


IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""Finer near zero, where most weights are. Source: ggml, kvalues_iq4nl."""

GGUF = (
    *(_of_gguf(values, "float16", 32) for values in ("int4", "int5", "int8", "codebook")),
    *(_of_gguf(values, "float16", 32, minima=True) for values in ("int4", "int5")),
    *(_of_gguf(values, "int8", 16) for values in ("int3", "int6")),
    *(_of_gguf(values, "int8", 32, minima=True) for values in ("int4", "int5")),
    _of_gguf("codebook", "int8", 32),
    _of_gguf("int2", "int8", 16, minima=True),
    *(_of_gguf(values, "float32", 32, minima=True) for values in ("int4", "int8")),
)
"""What block types hold, and last what holds several of them in one product."""

NAMED: dict[str, QuantScheme] = {
    scheme.name: scheme
    for scheme in (
        INT8, INT4, FP8, FP8_WEIGHTS, INT8_W8A8, MXFP4, MXFP8, NVFP4, INT4_FLOAT_ZEROS, INT8_FLOAT_ZEROS, NF4, *GGUF,
    )
}  # fmt: skip
"""One scheme of every name that core knows by itself; dataclasses.replace makes others of it."""

SCHEMES: frozenset[str] = frozenset(NAMED)
"""What a platform declares unless it says otherwise. The reference kernels serve these, and any other scheme."""

INT4_ZERO = 8
"""The zero of int4 values without zero points."""


def implied_zero(scheme: QuantScheme) -> int:
    """What is taken off every value of a scheme without zero points and minima: half the range of unsigned integers."""
    unsigned = scheme.values in ("int2", "int3", "int4", "int5", "int6")
    return 1 << (scheme.bits - 1) if unsigned and scheme.zero_points is None else 0


FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""
