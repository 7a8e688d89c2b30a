"""Encoder attention through torch's scaled_dot_product_attention: sequences of one length in one call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference import score_offsets
from anychip.plugin_api import EncoderBackend, EncoderLayer, EncoderView, Recorder, ShapeKey


@dataclass(slots=True)
class SameLength:
    """Sequences of one length."""

    length: int
    places: slice | Tensor
    """Of their tokens, sequence by sequence: a slice where they stand one behind the other, or [num_tokens]."""


@dataclass(slots=True)
class SdpaEncoderPlan:
    positions: Tensor
    groups: list[SameLength]


class SdpaEncoder(EncoderBackend):
    name = "cpu-sdpa-encoder"

    def plan(
        self,
        view: EncoderView,
        shape: ShapeKey,
        *,
        group: int,
        into: SdpaEncoderPlan | None = None,
        recorder: Recorder | None = None,
    ) -> SdpaEncoderPlan:
        lengths = view.host_query_lens
        starts = np.cumsum(lengths) - lengths
        groups = []
        for length in np.unique(lengths).tolist():
            first = starts[lengths == length]
            places: slice | Tensor = slice(int(first[0]), int(first[-1]) + length)
            if places.stop - places.start != length * len(first):  # others stand between them
                places = torch.from_numpy((first[:, None] + np.arange(length)).reshape(-1))
            groups.append(SameLength(length, places))
        return SdpaEncoderPlan(view.positions, groups)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: SdpaEncoderPlan, layer: EncoderLayer) -> Tensor:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for each in plan.groups:
            # [num_sequences, num_heads, length, head_dim]
            queries, keys, values = (x[each.places].unflatten(0, (-1, each.length)).transpose(1, 2) for x in (q, k, v))
            offsets = score_offsets(self.spec, layer, each.length, q.device)
            attended = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=None if offsets is None else offsets.to(q.dtype),
                scale=layer.scale,
                enable_gqa=self.spec.num_heads != self.spec.num_kv_heads,
            )
            out[each.places] = attended.transpose(1, 2).flatten(0, 1)
        return out
