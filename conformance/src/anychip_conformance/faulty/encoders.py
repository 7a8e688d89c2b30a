"""Faults of encoder attention."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import ReferenceEncoder
from anychip.plugin_api import EncoderLayer, EncoderView
from anychip_conformance.faulty.registry import fault


@fault("encoder-causal", "encoder", killed_by="encoder.attend.001")
class Causal(ReferenceEncoder):
    """A token does not see those behind it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        out, at = torch.zeros_like(q), 0
        for length in plan.host_query_lens.tolist():
            for end in range(at + 1, at + length + 1):
                alone = dataclasses.replace(plan, host_query_lens=np.array([end - at]))
                out[end - 1] = super().attend(q[at:end], k[at:end], v[at:end], alone, layer)[-1]
            at += length
        return out


@fault("encoder-one-sequence", "encoder", killed_by="encoder.attend.001")
class OneSequence(ReferenceEncoder):
    """All rows of a step are one sequence."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        whole = dataclasses.replace(plan, host_query_lens=plan.host_query_lens.sum(keepdims=True))
        return super().attend(q, k, v, whole, layer)


@fault("encoder-rows-of-one-length", "encoder", killed_by="encoder.attend.001")
class RowsOfOneLength(ReferenceEncoder):
    """Every row is taken to be as long as the first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        first, total = int(plan.host_query_lens[0]), int(plan.host_query_lens.sum())
        rest = [total % first] if total % first else []
        return super().attend(
            q, k, v, dataclasses.replace(plan, host_query_lens=np.array([first] * (total // first) + rest)), layer
        )


@fault("encoder-window-left-out", "encoder", killed_by="encoder.attend.002")
class WindowLeftOut(ReferenceEncoder):
    """Windowed layers see whole sequences."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        honest = ReferenceEncoder(dataclasses.replace(self.spec, window=None))
        return honest.attend(q, k, v, plan, layer)


@fault("encoder-window-too-narrow", "encoder", killed_by="encoder.attend.002")
class WindowTooNarrow(ReferenceEncoder):
    """A window counts the token itself, as a decoder's does."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        window = self.spec.window
        honest = ReferenceEncoder(dataclasses.replace(self.spec, window=None if window is None else window - 1))
        return honest.attend(q, k, v, plan, layer)


@fault("encoder-bias-turned", "encoder", killed_by="encoder.attend.003")
class BiasTurned(ReferenceEncoder):
    """The bias goes by the query's place minus the key's."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        turned = None if layer.bias is None else layer.bias.flip(1)
        return super().attend(q, k, v, plan, dataclasses.replace(layer, bias=turned))


@fault("encoder-bias-of-head-0", "encoder", killed_by="encoder.attend.003")
class BiasOfOneHead(ReferenceEncoder):
    """All heads have the first one's bias."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        first = None if layer.bias is None else layer.bias[:1].expand_as(layer.bias)
        return super().attend(q, k, v, plan, dataclasses.replace(layer, bias=first))


@fault("encoder-heads-in-turns", "encoder", killed_by="encoder.attend.005")
class HeadsInTurns(ReferenceEncoder):
    """Query heads take the KV heads in turns, not in runs."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        spec = self.spec
        turns = torch.arange(spec.num_heads, device=q.device) % spec.num_kv_heads
        honest = ReferenceEncoder(dataclasses.replace(spec, num_kv_heads=spec.num_heads))
        return honest.attend(q, k[:, turns], v[:, turns], plan, layer)


@fault("encoder-not-scaled", "encoder", killed_by="encoder.attend.001")
class NotScaled(ReferenceEncoder):
    """Scores are not scaled."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        return super().attend(q, k, v, plan, dataclasses.replace(layer, scale=1.0))
