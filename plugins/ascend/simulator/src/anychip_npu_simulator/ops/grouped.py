"""npu_grouped_matmul: one product for each group of rows. Source: _op_plugin_docs.py, npu_grouped_matmul.

Simulated is the case of one x, one weight of three dimensions and one result (split_item 2 or 3, group_type 0): without
quantization, with int8 by tokens, and with int8 weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip_npu_simulator.calls import EVERYWHERE, Arguments, simulates
from anychip_npu_simulator.machine import machine
from anychip_npu_simulator.ops.elementwise import FLOATS
from anychip_npu_simulator.ops.quantized import DTYPES

_MAX_GROUPS, _INNER_LIMIT, _OLD_STEP = 1024, 65536, 16
_CUMULATIVE = 0
_ACTIVATIONS = {0: lambda x: x, 1: F.relu, 2: lambda x: F.gelu(x, approximate="tanh"), 5: F.silu}


def _one(a: Arguments, name: str) -> Tensor | None:
    """A list of one tensor, or nothing."""
    given = getattr(a, name)
    if not given:
        return None
    a.check(len(given) == 1, name, f"{len(given)} tensors", "one, as weight is one of three dimensions")
    return given[0]


def _check(a: Arguments) -> None:
    a.absent("offset", "antiquant_offset", "activation_input", "activation_quant_scale", "activation_quant_offset")
    a.absent("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype", "tuning_config")
    a.only("split_item", 2, 3)
    a.only("group_type", 0)
    a.only("group_list_type", 0, 1)
    x, weight = _one(a, "x"), _one(a, "weight")
    assert x is not None and weight is not None
    a.dims("x", 2)
    a.dims("weight", 3)
    groups, k, n = weight.shape
    a.check(groups <= _MAX_GROUPS, "weight", f"of {groups} groups", f"up to {_MAX_GROUPS}")
    a.check(
        x.shape[1] == k,
        "weight",
        f"of shape {tuple(weight.shape)}",
        f"[groups, {x.shape[1]}, n], as x of shape {tuple(x.shape)}",
    )
    a.check(max(k, n) < _INNER_LIMIT, "weight", f"of {k} by {n}", f"below {_INNER_LIMIT}")
    a.check(x.is_contiguous(), "x", f"of strides {x.stride()}", "rows that are not transposed")
    a.check(a.group_list is not None, "group_list", None, "sizes or cumulative sizes of the groups")
    a.dtype("group_list", torch.int64)
    a.shape("group_list", (groups,))
    _check_dtypes(a, x, weight)


def _check_dtypes(a: Arguments, x: Tensor, weight: Tensor) -> None:
    groups, _, n = weight.shape
    old = machine().generation == "310P"
    out = DTYPES.get(a.output_dtype) if a.output_dtype is not None else None
    scale, by_token, antiquant, bias = (
        _one(a, name) for name in ("scale", "per_token_scale", "antiquant_scale", "bias")
    )
    a.dtype("x", *((torch.float16,) if old else (*FLOATS, torch.int8)))
    if old:
        a.check(n % _OLD_STEP == 0, "weight", f"of {n} columns", f"a multiple of {_OLD_STEP} on a 310P")
    if x.dtype == torch.int8:
        a.dtype("weight", torch.int8)
        a.check(scale is not None, "scale", None, f"[{groups}, {n}], with int8")
        a.dtype("scale", torch.float32, torch.bfloat16)
        a.shape("scale", (groups, n))
        a.dtype("per_token_scale", torch.float32)
        a.shape("per_token_scale", (len(x),))
        allowed = torch.bfloat16 if scale is not None and scale.dtype == torch.bfloat16 else torch.float16
        a.check(
            out == allowed,
            "output_dtype",
            out,
            f"{allowed}, with scale of {scale.dtype if scale is not None else None}",
        )
        a.dtype("bias", torch.int32)
    elif weight.dtype == torch.int8:
        a.check(antiquant is not None, "antiquant_scale", None, f"[{groups}, {n}], with an int8 weight")
        a.dtype("antiquant_scale", x.dtype)
        a.shape("antiquant_scale", (groups, n))
    else:
        a.dtype("weight", x.dtype)
        a.check(scale is None, "scale", "given", "None without int8")
    if x.dtype != torch.int8:
        a.check(by_token is None, "per_token_scale", "given", "None without int8")
        a.check(out in (None, x.dtype), "output_dtype", out, f"None or {x.dtype}")
        a.dtype("bias", torch.float16 if x.dtype == torch.float16 else torch.float32)
    a.check(bias is None or tuple(bias.shape) == (groups, n), "bias", "of another shape", f"[{groups}, {n}]")
    quantized = x.dtype == torch.int8 and by_token is not None
    a.only("act_type", *(tuple(_ACTIVATIONS) if quantized else (0,)))


@simulates("npu_grouped_matmul", _check, "npu_grouped_matmul", nz=("weight",), products=EVERYWHERE)
def grouped_matmul(a: Arguments) -> list[Tensor]:
    """Rows beyond the last group are undefined: NaN here."""
    x, weight, sizes = a.x[0], a.weight[0], a.group_list.tolist()
    ends = sizes if a.group_list_type == _CUMULATIVE else [sum(sizes[: i + 1]) for i in range(len(sizes))]
    rises = all(low <= high for low, high in zip([0, *ends], ends, strict=False))
    a.check(rises and ends[-1] <= len(x), "group_list", sizes, f"sizes that end at or before the {len(x)} rows of x")
    kind = DTYPES[a.output_dtype] if a.output_dtype is not None else x.dtype
    out = torch.full((len(x), weight.shape[2]), torch.nan, dtype=kind)
    for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if begin < end:
            out[begin:end] = _product(a, x[begin:end], weight[group], group, slice(begin, end)).to(kind)
    return [out]


def _product(a: Arguments, x: Tensor, weight: Tensor, group: int, rows: slice) -> Tensor:
    bias = a.bias[0][group] if a.bias else None
    if x.dtype == torch.int8:
        total = x.double() @ weight.double()
        total = total if bias is None else total + bias.double()
        scaled = total.float() * a.scale[0][group].float()
        if a.per_token_scale:
            scaled = scaled * a.per_token_scale[0][rows, None]
        return _ACTIVATIONS[a.act_type](scaled)
    wide = weight.float()
    if weight.dtype == torch.int8:
        wide = (wide * a.antiquant_scale[0][group].float()).to(x.dtype).float()
    out = x.float() @ wide
    return out if bias is None else out + bias.float()
