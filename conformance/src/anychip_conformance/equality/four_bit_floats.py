"""Four-bit floats as checkpoints pack them, written down from the formats' own papers: a table of numbers, two codes to
a byte, the even column in the low half. Shares nothing with core's readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anychip_conformance.equality.tiny_models import make_checkpoint

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of codes 0 to 7; 8 to 15 are their negatives."""
MX_GROUP = 32
NV_GROUP = 16
_E4M3_MAX = 448.0


def numbers(codes: Tensor) -> Tensor:
    return torch.tensor((*E2M1, *(-x for x in E2M1)))[codes.long()]


def codes(values: Tensor) -> Tensor:
    """The nearest code of each number; of two the even one."""
    distance = (values.abs().unsqueeze(-1) - torch.tensor(E2M1)).abs()
    nearest = distance.argmin(dim=-1)
    tied = distance.gather(-1, (nearest + 1).clamp(max=7).unsqueeze(-1)).squeeze(-1) == distance.amin(dim=-1)
    nearest = torch.where(tied & (nearest % 2 == 1) & (nearest < 7), nearest + 1, nearest)
    return (nearest + 8 * values.signbit()).to(torch.uint8)


def packed(codes: Tensor) -> Tensor:
    """[..., n] bytes of codes [..., 2 n]."""
    return codes[..., 0::2] + 16 * codes[..., 1::2]


def mx(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes [..., columns], exponents uint8 [..., groups], and the matrix that they stand for. The greatest power of
    two of a group becomes 4, the last one of e2m1."""
    groups = weight.float().unflatten(-1, (-1, MX_GROUP))
    exponent = (groups.abs().amax(dim=-1).clamp(min=2.0**-100).log2().floor() - 2).clamp(-127, 127)
    scale = torch.ldexp(torch.tensor(1.0), exponent).unsqueeze(-1)
    held = codes(groups / scale)
    return held.flatten(-2), (exponent + 127).to(torch.uint8), (numbers(held) * scale).flatten(-2)


def nv(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [rows, columns], e4m3 scales [rows, groups], the float32 number that multiplies them, and the matrix."""
    groups = weight.float().unflatten(-1, (-1, NV_GROUP))
    whole = weight.abs().max().float() / (6 * _E4M3_MAX)
    scale = (groups.abs().amax(dim=-1) / 6 / whole).to(torch.float8_e4m3fn)
    wide = (scale.float() * whole).unsqueeze(-1)
    held = codes(torch.where(wide > 0, groups / wide, torch.zeros(())))
    return held.flatten(-2), scale, whole, (numbers(held) * wide).flatten(-2)


def make_mxfp4_gpt_oss(folder: Path, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tiny GPT-OSS checkpoint as OpenAI publishes it, experts in MXFP4; returns the float32 model that it stands for,
    and its experts' matrices [num_experts, outputs, inputs] by module."""
    model = make_checkpoint("gpt-oss", folder, **settings)
    file = folder / "model.safetensors"
    stored: dict[str, Tensor] = {}
    matrices: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        held, exponents, matrices[name] = mx(tensor.transpose(1, 2))  # of inputs before outputs
        stored[f"{name}_blocks"] = packed(held).unflatten(-1, (-1, MX_GROUP // 2)).contiguous()
        stored[f"{name}_scales"] = exponents
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in matrices:
                parameter.copy_(matrices[name].transpose(1, 2))
    save_file(stored, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return model, matrices
