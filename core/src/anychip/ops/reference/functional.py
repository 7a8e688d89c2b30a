"""Reference of every single op that a model calls, but sampling's. Contracts: plugin_api/ops.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.plugin_api import Rope

_SWIGLU_LIMIT, _SWIGLU_SLOPE = 7.0, 1.702


def embedding(*, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    rows = weight.shape[0]
    local = ids - first
    held = (local >= 0) & (local < rows)
    picked = F.embedding(local.clamp(0, rows - 1), weight)
    return picked.masked_fill(~held.unsqueeze(-1), 0)


def rms_norm(*, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return normed.to(x.dtype) * weight


def rotary(*, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    cos = rope.cos[positions].unsqueeze(1)  # [num_tokens, 1, rotary_dim / 2]
    sin = rope.sin[positions].unsqueeze(1)
    turned, rest = x[..., : rope.rotary_dim].float(), x[..., rope.rotary_dim :]
    if rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1) if rest.shape[-1] else rotated.to(x.dtype)


def gated_activation(*, gate_up: Tensor, activation: str) -> Tensor:
    if activation == "relu2":  # of up alone
        return F.relu(gate_up).square()
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=_SWIGLU_LIMIT), up.clamp(-_SWIGLU_LIMIT, _SWIGLU_LIMIT)
        return (up + 1) * (gate * torch.sigmoid(_SWIGLU_SLOPE * gate))
    raise ValueError(f"activation {activation!r}; expected silu, gelu_tanh, swiglu_clamped or relu2")


def softcap(*, x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)
