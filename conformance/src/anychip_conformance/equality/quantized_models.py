"""Tiny checkpoints in every quantized container, with the transformers model that each of them stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from anychip.quantization.packing import pack, to_awq_order
from anychip_conformance.equality.four_bit_floats import mx, nv, packed
from anychip_conformance.equality.tiny_models import make_checkpoint

GROUP = 32
BLOCK = 32
"""Of block scales; published checkpoints have 128, more than a tiny matrix."""

Stored = dict[str, Tensor]
Store = Callable[[Tensor], tuple[Stored, Tensor]]
"""A weight [out_features, in_features] to a module's tensors, and the matrix that they stand for."""

Activations = Callable[[Tensor], Tensor] | None
"""What a scheme does to activations."""


def _grouped(weight: Tensor, *, zeros: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values 0 to 15 [rows, columns], scales and zeros [rows, groups], the matrix."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    if zeros:
        scale = ((high - low) / 15).half().float()
        zero = (-low / scale).round().clamp(0, 15)
    else:
        scale = (groups.abs().amax(dim=-1) / 7).half().float()
        zero = torch.full_like(scale, 8.0)
    values = (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    matrix = ((values - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
    return values.flatten(1), scale, zero, matrix


def _gptq(weight: Tensor, *, symmetric: bool) -> tuple[Stored, Tensor]:
    values, scale, zero, matrix = _grouped(weight, zeros=not symmetric)
    if not symmetric:  # the container holds zero - 1, so that a zero of 0 wraps to 15
        zero = zero.clamp(min=1)
        matrix = ((values.view(len(weight), -1, GROUP) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
    return {
        "qweight": pack(values.T, 0),
        "scales": scale.T.half(),
        "qzeros": pack(zero.T - 1, 1),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }, matrix


def _awq(weight: Tensor) -> tuple[Stored, Tensor]:
    values, scale, zero, matrix = _grouped(weight, zeros=True)
    return {
        "qweight": pack(to_awq_order(values.T.contiguous()), 1),
        "scales": scale.T.half(),
        "qzeros": pack(to_awq_order(zero.T.contiguous()), 1),
    }, matrix


def _fp8_tensor(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().max() / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _fp8_static(weight: Tensor) -> tuple[Stored, Tensor]:
    stored, matrix = _fp8_tensor(weight)
    return {**stored, "input_scale": torch.tensor(_STATIC)}, matrix


_STATIC = 0.02


def _fp8_block(weight: Tensor) -> tuple[Stored, Tensor]:
    blocks = weight.view(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
    values = (blocks / scale).to(torch.float8_e4m3fn)
    matrix = (values.float() * scale).reshape(weight.shape)
    return {"weight": values.reshape(weight.shape), "weight_scale_inv": scale[:, 0, :, 0]}, matrix


def _fp8_channel(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _int8_channel(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _packed(weight: Tensor, *, zeros: bool) -> tuple[Stored, Tensor]:
    values, scale, zero, matrix = _grouped(weight, zeros=zeros)
    stored = {
        "weight_packed": pack(values, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return (stored | {"weight_zero_point": pack(zero, 0)} if zeros else stored), matrix


def _packed8(weight: Tensor) -> tuple[Stored, Tensor]:
    stored, matrix = _int8_channel(weight)
    packed = pack(stored["weight"].int() + 128, 1, bits=8)
    scale, shape = stored["weight_scale"], torch.tensor(weight.shape)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}, matrix


def _mxfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    held, exponents, matrix = mx(weight)
    return {"weight_packed": packed(held), "weight_scale": exponents}, matrix


def _nvfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    held, scale, whole, matrix = nv(weight)
    stored = {"weight": packed(held), "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.1)}
    return stored, matrix


def _nvfp4_divided(weight: Tensor) -> tuple[Stored, Tensor]:
    # Where its reciprocal is stored, a power of two is what both forms can say.
    weight = weight / weight.abs().max() * 6 * 448 * 2.0**-13
    held, scale, whole, matrix = nv(weight)
    stored = {"weight_packed": packed(held), "weight_scale": scale, "weight_global_scale": (1 / whole).view(1)}
    return {**stored, "input_global_scale": torch.tensor([8.0])}, matrix


def _rounded(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    scaled = x / scale
    return (scaled.round() if kind == "int8" else scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()) * scale


def _by_token(kind: str) -> Activations:
    most = 127 if kind == "int8" else 448
    return lambda x: _rounded(x, x.abs().amax(dim=-1, keepdim=True) / most, kind)


def _by_group(x: Tensor) -> Tensor:
    groups = x.view(*x.shape[:-1], -1, BLOCK)
    return _rounded(groups, groups.abs().amax(dim=-1, keepdim=True) / 448, "fp8").view(x.shape)


def _static(x: Tensor) -> Tensor:
    return _rounded(x, torch.tensor(_STATIC), "fp8")


def _compressed(kind: str, bits: int, strategy: str, inputs: dict[str, Any] | None = None, **weights: Any) -> Any:
    settings = {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": settings, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


_DYNAMIC_FP8 = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
_DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}

Container = tuple[Store, Activations, dict[str, Any]]
"""How a weight is stored, what happens to activations, config.json's quantization_config."""

CONTAINERS: dict[str, Container] = {
    "gptq": (
        lambda weight: _gptq(weight, symmetric=True),
        None,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    ),
    "gptq-zeros": (
        lambda weight: _gptq(weight, symmetric=False),
        None,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False},
    ),
    "awq": (
        _awq,
        None,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "fp8-tensor": (_fp8_tensor, _by_token("fp8"), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8-static": (_fp8_static, _static, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-block": (
        _fp8_block,
        _by_group,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    ),
    "ct-fp8-channel": (_fp8_channel, _by_token("fp8"), _compressed("float", 8, "channel", _DYNAMIC_FP8)),
    "ct-int8": (_int8_channel, _by_token("int8"), _compressed("int", 8, "channel", _DYNAMIC_INT8)),
    "ct-int8-weights": (_packed8, None, _compressed("int", 8, "channel")),
    "ct-fp8-weights": (_fp8_channel, None, _compressed("float", 8, "channel")),
    "ct-mxfp4": (_mxfp4, None, _compressed("float", 4, "group", group_size=32)),
    "ct-nvfp4": (
        _nvfp4_divided,
        None,
        _compressed("float", 4, "tensor_group", {"num_bits": 4, "type": "float", "dynamic": "local"}, group_size=16),
    ),
    "modelopt-nvfp4": (_nvfp4, None, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}),
    "ct-int4": (
        lambda weight: _packed(weight, zeros=False),
        None,
        _compressed("int", 4, "group", group_size=GROUP),
    ),
    "ct-int4-zeros": (
        lambda weight: _packed(weight, zeros=True),
        None,
        _compressed("int", 4, "group", group_size=GROUP, symmetric=False),
    ),
}


def make_quantized_checkpoint(
    container: str, folder: Path, family: str = "llama"
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Saves the checkpoint; returns the float32 model that computes what it stands for, and its matrices by module."""
    return store_checkpoint(CONTAINERS[container], folder, family)


def store_checkpoint(container: Container, folder: Path, family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The same in a container that is described so."""
    store, activations, settings = container
    make_checkpoint(family, folder)
    plain, stored, matrices = load_file(folder / _WEIGHTS), {}, {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            stored[name] = tensor
            continue
        parts, matrices[module] = store(tensor)
        stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    model = _dequantized(folder, {**plain, **{f"{module}.weight": matrix for module, matrix in matrices.items()}})
    for linear in model.modules():
        if isinstance(linear, nn.Linear) and linear is not model.lm_head and activations is not None:
            linear.register_forward_pre_hook(lambda _, inputs: (activations(inputs[0]),))
    save_file(stored, folder / _WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return model, matrices


_WEIGHTS = "model.safetensors"


def _dequantized(folder: Path, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """The library's model of these tensors, in whatever form it keeps them."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS, {"format": "pt"})
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.float().eval()
