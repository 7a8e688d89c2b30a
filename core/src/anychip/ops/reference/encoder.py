"""Encoder attention in plain PyTorch: one softmax over a whole sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.plugin_api.encoder import EncoderBackend, EncoderLayer, EncoderSpec, EncoderView


class ReferenceEncoder(EncoderBackend):
    name = "reference"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        out, begin = torch.zeros_like(q), 0
        for length in plan.host_query_lens.tolist():
            end = begin + length
            out[begin:end] = attend_sequence(q[begin:end], k[begin:end], v[begin:end], self.spec, layer)
            begin = end
        return out


def attend_sequence(q: Tensor, k: Tensor, v: Tensor, spec: EncoderSpec, layer: EncoderLayer) -> Tensor:
    """[length, num_heads, head_dim] of one sequence; keys and values have num_kv_heads."""
    share = spec.num_heads // spec.num_kv_heads
    queries, keys, values = (x.transpose(0, 1).float() for x in (q, k, v))
    keys, values = (x.repeat_interleave(share, dim=0) for x in (keys, values))
    scores = queries @ keys.transpose(1, 2) * layer.scale  # [num_heads, length, length]
    offsets = score_offsets(spec, layer, len(q), q.device)
    if offsets is not None:
        scores = scores + offsets
    return (scores.softmax(dim=-1) @ values).transpose(0, 1).to(q.dtype)


def score_offsets(spec: EncoderSpec, layer: EncoderLayer, length: int, device: torch.device) -> Tensor | None:
    """What is added to the scaled scores of a sequence: [num_heads or 1, length, length] float32; None: nothing."""
    if layer.bias is None and (spec.window is None or length <= spec.window + 1):
        return None
    places = torch.arange(length, device=device)
    distance = places - places.unsqueeze(-1)  # of the key from the query
    offsets = torch.zeros(1, length, length, device=device)
    if layer.bias is not None:
        offsets = layer.bias[:, distance.clamp(-layer.reach, layer.reach) + layer.reach]
    if spec.window is not None:
        offsets = offsets.masked_fill(distance.abs() > spec.window, float("-inf"))
    return offsets
