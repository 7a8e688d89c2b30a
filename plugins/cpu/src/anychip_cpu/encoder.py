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
class SdpaEncoderPlan:
    positions: Tensor
    groups: list[Tensor]
    """By length of sequences: the places of their tokens, [num_sequences, length]."""


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
            groups.append(torch.from_numpy(first[:, None] + np.arange(length)))
        return SdpaEncoderPlan(view.positions, groups)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: SdpaEncoderPlan, layer: EncoderLayer) -> Tensor:
        out = torch.zeros_like(q)
        for places in plan.groups:
            queries, keys, values = (x[places].transpose(1, 2) for x in (q, k, v))
            offsets = score_offsets(self.spec, layer, places.shape[1], q.device)
            attended = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=None if offsets is None else offsets.to(q.dtype),
                scale=layer.scale,
                enable_gqa=self.spec.num_heads != self.spec.num_kv_heads,
            )
            out[places] = attended.transpose(1, 2)
        return out
