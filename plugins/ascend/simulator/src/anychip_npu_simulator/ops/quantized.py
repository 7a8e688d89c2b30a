"""Quantized products of one weight, and quantization of activations. Source: _op_plugin_docs.py under each name."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip_npu_simulator.calls import EVERYWHERE, Arguments, simulates
from anychip_npu_simulator.machine import machine
from anychip_npu_simulator.ops.elementwise import FLOATS
from anychip_npu_simulator.ops.moe import quantize_rows

DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
"""torch's numbers of dtypes, which the vendor's schemas take."""
_MAX_WIDTH = 65535
_GROUP_STEP = 32
_INT4 = 8
"""Values of four bits in an int32, the first in the lowest bits."""
_INT8 = 1


# -- activations -------------------------------------------------------------------------------------------


def _check_dynamic(a: Arguments) -> None:
    a.dtype("input", torch.float16, torch.bfloat16)
    a.check(a.input.dim() > 1, "input", f"of shape {tuple(a.input.shape)}", "two or more dimensions")
    a.absent("group_index")
    a.only("dst_type", None, _INT8)
    a.only("quant_mode", "pertoken")
    a.dtype("smooth_scales", a.input.dtype)
    a.shape("smooth_scales", (a.input.shape[-1],))


@simulates("npu_dynamic_quant", _check_dynamic, "npu_dynamic_quant")
def dynamic_quant(a: Arguments) -> tuple[Tensor, Tensor]:
    wide = a.input.float() if a.smooth_scales is None else a.input.float() * a.smooth_scales.float()
    return quantize_rows(wide)


# -- int8 by int8 ------------------------------------------------------------------------------------------


def _check_quant_matmul(a: Arguments) -> None:
    a.dtype("x1", torch.int8)
    a.dtype("x2", torch.int8)
    a.dims("x1", 2, 3, 4, 5, 6)
    a.dims("x2", 2, 3, 4, 5, 6)
    a.absent("offset", "x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype", "group_sizes", "y_scale")
    k, n = a.x2.shape[-2:]
    a.check(
        a.x1.shape[-1] == k,
        "x2",
        f"of shape {tuple(a.x2.shape)}",
        f"[{a.x1.shape[-1]}, n], as x1 of shape {tuple(a.x1.shape)}",
    )
    for name, width in (("x1", a.x1.shape[-1]), ("x2", n)):
        a.check(width <= _MAX_WIDTH, name, f"of width {width}", f"up to {_MAX_WIDTH}")
    a.dtype("scale", torch.float32, torch.bfloat16)
    a.shape("scale", (1,), (n,))
    a.only("output_dtype", *(number for number, dtype in DTYPES.items() if dtype != torch.float32))
    out = DTYPES[a.output_dtype]
    if out == torch.float16:
        a.dtype("scale", torch.float32)
    a.dtype("pertoken_scale", torch.float32)
    a.shape("pertoken_scale", (a.x1.shape[-2],))
    a.check(
        a.pertoken_scale is None or out in (torch.float16, torch.bfloat16),
        "pertoken_scale",
        "given",
        f"None with output_dtype {out}",
    )
    floats = {torch.float16: (torch.float16, torch.float32), torch.bfloat16: (torch.bfloat16, torch.float32)}.get(
        out, ()
    )
    a.dtype("bias", torch.int32, *(floats if out == torch.bfloat16 or a.pertoken_scale is not None else ()))
    a.shape("bias", (n,), (1, n))
    if machine().generation == "310P":
        a.check(a.pertoken_scale is None, "pertoken_scale", "given", "None on a 310P")
        a.check(out in (torch.float16, torch.int8), "output_dtype", out, "float16 or int8 on a 310P")
        a.check(a.nz("x2"), "x2", "ND", "FRACTAL_NZ of the transposed weight on a 310P")


@simulates("npu_quant_matmul", _check_quant_matmul, "npu_quant_matmul", nz=("x2",), products=EVERYWHERE)
def quant_matmul(a: Arguments) -> Tensor:
    """Sums of integers are exact; scales are applied in float32."""
    total = a.x1.double() @ a.x2.double()
    late = a.bias is not None and a.bias.dtype.is_floating_point
    if a.bias is not None and not late:
        total = total + a.bias.double()
    out = DTYPES[a.output_dtype]
    if out == torch.int32:
        return total.to(torch.int32)
    scaled = total.float() * a.scale.float()
    if a.pertoken_scale is not None:
        scaled = scaled * a.pertoken_scale[:, None]
    if late:
        scaled = scaled + a.bias.float()
    return scaled.round().clamp(-128, 127).to(out) if out == torch.int8 else scaled.to(out)


# -- weights of few bits -----------------------------------------------------------------------------------


def unpack(packed: Tensor, dim: int) -> Tensor:
    """int32 with eight int4 along `dim` to int8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed.movedim(dim, -1)[..., None] >> shifts) & 15
    signed = torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8)
    return signed.flatten(-2).movedim(-1, dim)


def _check_pack(a: Arguments) -> None:
    a.dtype("weight", torch.int32)
    a.dims("weight", 2, 3)
    a.contiguous("weight")
    a.check(
        a.weight.shape[-1] % _INT4 == 0,
        "weight",
        f"of shape {tuple(a.weight.shape)}",
        f"a last dimension of {_INT4} and more",
    )
    a.only("inner_k_tiles", 0)


@simulates("npu_convert_weight_to_int4pack", _check_pack, "npu_convert_weight_to_int4pack")
def int4pack(a: Arguments) -> Tensor:
    """[.., n] int32 of values -8 to 7 to [.., n / 8] int32."""
    low, high = int(a.weight.min()), int(a.weight.max())
    a.check(low >= -8 and high <= 7, "weight", f"from {low} to {high}", "-8 to 7")
    nibbles = (a.weight.long() & 15).unflatten(-1, (-1, _INT4)) << torch.arange(0, 32, 4)
    whole = nibbles.sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def _weight_shape(weight: Tensor) -> tuple[int, int]:
    """k and n of a weight that may be packed, along n where it is contiguous and along k where it is transposed."""
    k, n = weight.shape
    if weight.dtype == torch.int32:
        return (k, n * _INT4) if weight.is_contiguous() else (k * _INT4, n)
    return k, n


def _check_weight_quant(a: Arguments) -> None:
    old = machine().generation == "310P"
    a.dtype("x", torch.float16, *(() if old else (torch.bfloat16,)))
    a.dims("x", 2)
    a.dtype("weight", torch.int8, *(() if old else (torch.int32,)))
    a.dims("weight", 2)
    a.absent("quant_scale", "quant_offset", "weight_dtype")
    k, n = _weight_shape(a.weight)
    a.check(
        a.x.shape[1] == k,
        "weight",
        f"of shape {tuple(a.weight.shape)}",
        f"{a.x.shape[1]} rows, as x of shape {tuple(a.x.shape)} has columns",
    )
    a.check(0 < k <= _MAX_WIDTH and 0 < n <= _MAX_WIDTH, "weight", f"of {k} by {n}", f"1 to {_MAX_WIDTH} each")
    size = a.antiquant_group_size
    if size:
        a.check(not old, "antiquant_group_size", size, "0 on a 310P")
        fits = _GROUP_STEP <= size <= k - 1 and size % _GROUP_STEP == 0
        a.check(fits, "antiquant_group_size", size, f"0, or a multiple of {_GROUP_STEP} from {_GROUP_STEP} to {k - 1}")
    shapes = ((-(-k // size), n),) if size else ((1,), (1, 1), (n,), (1, n))
    for name in ("antiquant_scale", "antiquant_offset"):
        a.dtype(name, a.x.dtype)
        a.shape(name, *shapes)
    same = a.antiquant_offset is None or a.antiquant_offset.shape == a.antiquant_scale.shape
    a.check(same, "antiquant_offset", "of another shape", f"{tuple(a.antiquant_scale.shape)}, as antiquant_scale")
    a.dtype("bias", torch.float32 if a.x.dtype == torch.bfloat16 else torch.float16)
    a.shape("bias", (n,), (1, n))
    a.contiguous("bias")


@simulates("npu_weight_quant_batchmatmul", _check_weight_quant, "npu_weight_quant_batchmatmul", products=EVERYWHERE)
def weight_quant_batchmatmul(a: Arguments) -> Tensor:
    """x @ ((weight + antiquant_offset) * antiquant_scale) + bias. FRACTAL_NZ is documented for torchair alone."""
    weight = a.weight
    if weight.dtype == torch.int32:
        weight = unpack(weight, 1 if weight.is_contiguous() else 0)
    wide, k = weight.float(), weight.shape[0]
    for values, combine in ((a.antiquant_offset, torch.add), (a.antiquant_scale, torch.mul)):
        if values is not None:
            per_row = values.float()
            if a.antiquant_group_size:
                per_row = per_row.repeat_interleave(a.antiquant_group_size, 0)[:k]
            wide = combine(wide, per_row)
    out = a.x.float() @ wide.to(a.x.dtype).float()
    return (out if a.bias is None else out + a.bias.float()).to(a.x.dtype)


# -- batches of products -----------------------------------------------------------------------------------


def _check_transposed(a: Arguments) -> None:
    for name in ("input", "weight"):
        a.dtype(name, *FLOATS)
        a.dims(name, 3)
    a.dtype("weight", a.input.dtype)
    a.absent("bias", "scale")
    x, w = a.input.permute(a.perm_x1 or [0, 1, 2]), a.weight.permute(a.perm_x2 or [0, 1, 2])
    a.check(
        x.shape[0] == w.shape[0] and x.shape[2] == w.shape[1],
        "weight",
        f"{tuple(w.shape)} after perm_x2",
        f"[{x.shape[0]}, {x.shape[2]}, n]",
    )
    factor = a.batch_split_factor
    a.check(factor and x.shape[0] % factor == 0, "batch_split_factor", factor, f"a divisor of the batch, {x.shape[0]}")


@simulates("npu_transpose_batchmatmul", _check_transposed, "npu_transpose_batchmatmul", nz=("weight",))
def transpose_batchmatmul(a: Arguments) -> Tensor:
    x, w = a.input.permute(a.perm_x1 or [0, 1, 2]), a.weight.permute(a.perm_x2 or [0, 1, 2])
    y = torch.bmm(x.float(), w.float()).to(a.input.dtype)  # [batch, m, n]
    if a.batch_split_factor > 1:
        return y.unflatten(0, (a.batch_split_factor, -1)).transpose(1, 2).flatten(2).contiguous()
    return y.permute(a.perm_y or [1, 0, 2]).contiguous()
