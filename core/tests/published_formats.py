"""Formats of checkpoints as their papers and packages describe them, written down in plain operations: how each stores
a matrix, and the float32 matrix that it stands for. Shares nothing with core's readers."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

from anychip.quantization.packing import pack, to_awq_order
from anychip_conformance.equality.four_bit_floats import mx, packed
from anychip_conformance.equality.quantized_models import Container, Stored

GROUP = 32
BLOCK = 64
"""Of bitsandbytes."""
NESTED = 256

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BNB_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)


# -- floats with a scale for each group --------------------------------------------------------------------------


def mxfp8(weight: Tensor) -> tuple[Stored, Tensor]:
    """The greatest of a group lies between 256, the last power of two of e4m3, and 512."""
    groups = weight.unflatten(-1, (-1, GROUP))
    exponent = (groups.abs().amax(dim=-1).clamp(min=2.0**-100).log2().floor() - 8).clamp(-127, 127)
    scale = torch.ldexp(torch.tensor(1.0), exponent).unsqueeze(-1)
    values = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    stored = {"weight": values.flatten(-2), "weight_scale": (exponent + 127).to(torch.uint8)}
    return stored, (values.float() * scale).flatten(-2)


def mxfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    held, exponents, matrix = mx(weight)
    return {"weight": packed(held), "weight_scale": exponents}, matrix


def bytes_by_channel(weight: Tensor, dtype: torch.dtype, most: float) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(dim=1) / most
    scaled = weight / scale.unsqueeze(-1)
    values = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.unsqueeze(-1)


def fp8_static(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().max() / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(STATIC)}, values.float() * scale


STATIC = 0.02


# -- bitsandbytes ------------------------------------------------------------------------------------------------


def four_bits(weight: Tensor, *, kind: str, double: bool) -> tuple[Stored, Tensor]:
    table = torch.tensor(NF4) if kind == "nf4" else torch.tensor(_BNB_FP4) / 12
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    state = {"quant_type": kind, "blocksize": BLOCK, "dtype": "float32", "shape": list(weight.shape)}
    stored: Stored = {"weight.quant_map": table}
    if double:
        offset = absmax.mean().item()
        codes = (torch.arange(256) / 127.5 - 1) ** 3
        pieces = (absmax - offset).split(NESTED)
        upper = torch.stack([piece.abs().max() for piece in pieces])
        every = upper.repeat_interleave(NESTED)[: len(absmax)]
        index = ((absmax - offset) / every).unsqueeze(1).sub(codes).abs().argmin(dim=1)
        absmax = codes[index] * every + offset
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        stored |= {"weight.nested_absmax": upper, "weight.nested_quant_map": codes}
        stored["weight.absmax"] = index.to(torch.uint8)
    else:
        stored["weight.absmax"] = absmax
    picks = (blocks / absmax.unsqueeze(1)).unsqueeze(-1).sub(table).abs().argmin(dim=-1)
    flat = picks.flatten().to(torch.uint8)
    stored["weight"] = (flat[0::2] * 16 + flat[1::2]).unsqueeze(1)
    held = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = held
    return stored, (table[picks] * absmax.unsqueeze(1)).view(weight.shape)


def llm_int8(weight: Tensor) -> tuple[Stored, Tensor]:
    greatest = weight.abs().amax(dim=1)
    values = (weight / greatest.unsqueeze(1) * 127).round().to(torch.int8)
    stored = {"weight": values, "SCB": greatest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, values.float() * (greatest / 127).unsqueeze(1)


# -- integers with zeros by group --------------------------------------------------------------------------------


def grouped(weight: Tensor, bits: int, *, zeros: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values [rows, columns], scales in float16's numbers and zeros of at least 1 [rows, groups], the matrix."""
    groups, most = weight.unflatten(-1, (-1, GROUP)), 2**bits - 1
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    if zeros:
        scale = ((high - low) / most).half().float()
        zero = (-low / scale).round().clamp(1, most)
    else:
        scale = (groups.abs().amax(dim=-1) / (most // 2)).half().float()
        zero = torch.full_like(scale, 2.0 ** (bits - 1))
    values = (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, most)
    matrix = ((values - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
    return values.flatten(1), scale, zero, matrix


def shuffled(columns: int) -> Tensor:
    """The same for every matrix of so many columns, as matrices that read the same activations have it."""
    return torch.randperm(columns, generator=torch.Generator().manual_seed(columns))


def gptq(weight: Tensor, bits: int, *, zeros: bool, by_activation: bool = False) -> tuple[Stored, Tensor]:
    columns = weight.shape[1]
    order = shuffled(columns) if by_activation else torch.arange(columns)
    values, scale, zero, matrix = grouped(weight[:, order], bits, zeros=zeros)
    back = order.argsort()
    stored = {
        "qweight": pack(values[:, back].T, 0, bits),
        "scales": scale.T.half(),
        "qzeros": pack(zero.T - 1, 1, bits),
        "g_idx": (back // GROUP).int(),
    }
    return stored, matrix[:, back]


def compressed_in_order(weight: Tensor, bits: int) -> tuple[Stored, Tensor]:
    order = shuffled(weight.shape[1])
    values, scale, _, matrix = grouped(weight[:, order], bits, zeros=False)
    back = order.argsort()
    stored = {
        "weight_packed": pack(values[:, back], 1, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": (back // GROUP).int(),
    }
    return stored, matrix[:, back]


def awq_gemm(weight: Tensor) -> tuple[Stored, Tensor]:
    values, scale, zero, matrix = grouped(weight, 4, zeros=True)
    stored = {
        "qweight": pack(to_awq_order(values.T.contiguous()), 1),
        "scales": scale.T.half(),
        "qzeros": pack(to_awq_order(zero.T.contiguous()), 1),
    }
    return stored, matrix


def awq_gemv(weight: Tensor) -> tuple[Stored, Tensor]:
    values, scale, zero, matrix = grouped(weight, 4, zeros=True)
    # Groups of 32: four words of zeros at once, thirty-two groups.
    room = -scale.shape[1] % 32
    padded = torch.nn.functional.pad
    stored = {
        "qweight": pack(values, 1),
        "scales": padded(scale, (0, room)).half(),
        "qzeros": pack(padded(zero, (0, room)), 1),
    }
    return stored, matrix


def hqq(weight: Tensor, bits: int) -> tuple[Stored, Tensor]:
    rows = weight.reshape(-1, GROUP)
    low, high, most = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True), 2**bits - 1
    scale = ((high - low) / most).half()
    zero = (-low / scale.float()).half()
    values = (rows / scale.float() + zero.float()).round().clamp(0, most)
    pieces = values.to(torch.uint8).chunk(8 // bits)
    held = torch.zeros_like(pieces[0])
    for piece in pieces:
        held = (held << bits if bits < 8 else held) | piece
    stored: Stored = {"W_q": held, "scale": scale, "zero": zero, "shape": torch.tensor(weight.shape)}
    for name, number in (("nbits", bits), ("group_size", GROUP), ("axis", 1)):
        stored[name] = torch.tensor(number, dtype=torch.int32)
    stored["packing"] = torch.tensor(list(f"{bits}bit_u8".encode()), dtype=torch.uint8)
    return stored, ((values - zero.float()) * scale.float()).view(weight.shape)


# -- what config.json says ---------------------------------------------------------------------------------------


def _by_token(most: float, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    def round_activations(x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / most
        return (x / scale).round() * scale if dtype is None else (x / scale).to(dtype).float() * scale

    return round_activations


def _static(x: Tensor) -> Tensor:
    return (x / STATIC).clamp(-448, 448).to(torch.float8_e4m3fn).float() * STATIC


def _gptq_settings(bits: int, **more: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": True, "desc_act": False, **more}


def _compressed(form: str, **weights: object) -> dict[str, object]:
    settings = {"strategy": "group", "group_size": GROUP, "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": settings, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def _quark(dtype: str, qscheme: str, inputs: dict[str, object] | None = None, **more: object) -> dict[str, object]:
    weight = {"dtype": dtype, "qscheme": qscheme, "is_dynamic": False, "symmetric": True, **more}
    groups = {"global_quant_config": {"weight": weight, "input_tensors": inputs}, "layer_quant_config": {}}
    return {"quant_method": "quark", "export": {"kv_cache_group": []}, "exclude": ["lm_head"], **groups}


def _hqq(bits: int) -> dict[str, object]:
    params = {"nbits": bits, "group_size": GROUP, "axis": 1, "view_as_float": False}
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}, "skip_modules": ["lm_head"]}


def _autoround(packing: str, *, symmetric: bool) -> dict[str, object]:
    settings = {"bits": 4, "group_size": GROUP, "sym": symmetric, "extra_config": {"lm_head": {"bits": 16}}}
    return {"quant_method": "auto-round", "packing_format": packing, **settings}


_MX = {"group_size": GROUP, "scale_format": "e8m0"}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
_FP8_INPUTS = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
_INT8_INPUTS = {"dtype": "int8", "qscheme": "per_channel", "is_dynamic": True}

FORMATS: dict[str, Container] = {
    "ct-mxfp8": (mxfp8, None, _compressed("mxfp8-quantized", type="float", num_bits=8, scale_dtype="torch.uint8")),
    "modelopt-mxfp8": (mxfp8, None, {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "modelopt-fp8": (fp8_static, _static, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "quark-mxfp8": (mxfp8, None, _quark("fp8_e4m3", "per_group", **_MX)),
    "quark-mxfp4": (mxfp4, None, _quark("fp4", "per_group", **_MX)),
    "quark-fp8": (fp8_static, _static, _quark("fp8_e4m3", "per_tensor", _FP8_INPUTS)),
    "quark-int8": (
        lambda weight: bytes_by_channel(weight, torch.int8, 127),
        _by_token(127, None),
        _quark("int8", "per_channel", _INT8_INPUTS),
    ),
    "quark-fp8-weights": (
        lambda weight: bytes_by_channel(weight, torch.float8_e4m3fn, 448), None, _quark("fp8_e4m3", "per_channel"),
    ),
    "bnb-nf4": (lambda weight: four_bits(weight, kind="nf4", double=False), None, _BNB),
    "bnb-nf4-double": (lambda weight: four_bits(weight, kind="nf4", double=True), None, _BNB),
    "bnb-fp4": (lambda weight: four_bits(weight, kind="fp4", double=False), None, _BNB),
    "bnb-int8": (llm_int8, None, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq-8": (lambda weight: gptq(weight, 8, zeros=False), None, _gptq_settings(8)),
    "gptq-8-zeros": (lambda weight: gptq(weight, 8, zeros=True), None, _gptq_settings(8, sym=False)),
    "gptq-desc-act": (
        lambda weight: gptq(weight, 4, zeros=True, by_activation=True), None,
        _gptq_settings(4, sym=False, desc_act=True),
    ),
    "gptq-8-desc-act": (
        lambda weight: gptq(weight, 8, zeros=False, by_activation=True), None, _gptq_settings(8, desc_act=True),
    ),
    "ct-actorder": (
        lambda weight: compressed_in_order(weight, 4),
        None,
        _compressed("pack-quantized", type="int", num_bits=4, actorder="group"),
    ),
    "awq-gemv": (
        awq_gemv, None,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemv"},
    ),
    "hqq-8": (lambda weight: hqq(weight, 8), None, _hqq(8)),
    "hqq-4": (lambda weight: hqq(weight, 4), None, _hqq(4)),
    "hqq-2": (lambda weight: hqq(weight, 2), None, _hqq(2)),
    "autoround-gptq": (
        lambda weight: gptq(weight, 4, zeros=False), None,
        _autoround("auto_round:auto_gptq", symmetric=True),
    ),
    "autoround-awq": (
        awq_gemm, None,
        _autoround("auto_round:auto_awq", symmetric=False),
    ),
}  # fmt: skip
"""By name, as quantized_models.CONTAINERS."""
