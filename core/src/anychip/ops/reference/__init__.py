"""The reference implementations: plain PyTorch, correct on any torch device, slow on most.

Core hands REFERENCE to every platform it opens. A plugin may import from here to build on a reference
(`DenseCacheAttention`, for one) and in its tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import adapters, functional, quantized, sampling
from anychip.ops.reference.adapters import add_low_rank, blank_stacks, write_adapters
from anychip.ops.reference.arena import arena_views
from anychip.ops.reference.attention import (
    BYTE_RANGES,
    DenseCacheAttention,
    ReferenceAttention,
    attend_gathered,
    attend_row,
    attend_row_with_lse,
    merge_attention,
    softmax_with_sinks,
)
from anychip.ops.reference.block_moves import last_copies
from anychip.ops.reference.canonical import dequantize
from anychip.ops.reference.composite import CompositeOps
from anychip.ops.reference.encoder import ReferenceEncoder, attend_sequence, score_offsets
from anychip.ops.reference.forward import Passed, forward_pass, logits_of
from anychip.ops.reference.latent import ReferenceLatent
from anychip.ops.reference.linear import DenseWeights, ReferenceLinear, reference_linear
from anychip.ops.reference.moe import ExpertWeights, ReferenceMoE
from anychip.ops.reference.process_group import ProcessGroupCommunicator
from anychip.ops.reference.scans import gated_sum_chunked, gated_sum_recurrent
from anychip.ops.reference.sparse_latent import SparseLatent, dense_part, greatest_scores
from anychip.ops.reference.state import RULES, DenseStates, ReferenceStates, reference_state
from anychip.ops.reference.step import (
    Drawn,
    EditState,
    draw_tokens,
    pooled_sums,
    token_scores,
    write_embeddings,
)
from anychip.ops.reference.widened import WidenedLinear, WidenedMoE, can_widen, with_wide_scales
from anychip.plugin_api import (
    OP_VERSIONS,
    AttentionBackend,
    AttentionSpec,
    EncoderBackend,
    EncoderSpec,
    FusedMoE,
    LatentBackend,
    LatentSpec,
    LinearKernel,
    LinearSpec,
    StateBackend,
    StateSpec,
)
from anychip.plugin_api import MoESpec as MoESpec
from anychip.plugin_api.platform import Platform

__all__ = [
    "BYTE_RANGES", "REFERENCE", "REFERENCE_OPS", "RULES", "CompositeOps", "DenseCacheAttention", "DenseStates",
    "DenseWeights", "Drawn", "EditState", "ExpertWeights", "Passed", "ProcessGroupCommunicator",
    "ReferenceAttention", "ReferenceEncoder", "ReferenceLatent", "ReferenceLinear", "ReferenceMoE",
    "ReferenceStates", "SparseLatent", "WidenedLinear", "WidenedMoE", "add_low_rank", "arena_views",
    "attend_gathered", "attend_row", "attend_row_with_lse", "attend_sequence", "blank_stacks", "can_widen",
    "dense_part", "dequantize", "draw_tokens", "forward_pass", "functional", "gated_sum_chunked",
    "gated_sum_recurrent", "greatest_scores", "last_copies", "logits_of", "merge_attention", "pooled_sums", "quantized",
    "reference_linear", "sampling", "score_offsets", "softmax_with_sinks", "token_scores", "with_wide_scales",
    "write_adapters", "write_embeddings",
]  # fmt: skip


class _ReferenceKernels:
    """plugin_api.ReferenceKernels, implemented."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return ReferenceAttention(spec)

    def latent(self, spec: LatentSpec) -> LatentBackend:
        return SparseLatent(spec, ReferenceLatent(dense_part(spec))) if spec.index_dim else ReferenceLatent(spec)

    def state(self, spec: StateSpec) -> StateBackend:
        return reference_state(spec)

    def encoder(self, spec: EncoderSpec) -> EncoderBackend:
        return ReferenceEncoder(spec)

    def linear(self, spec: LinearSpec, platform: Platform) -> LinearKernel:
        return reference_linear(spec, platform)

    def moe(self, spec: MoESpec, platform: Platform) -> FusedMoE:
        return ReferenceMoE(spec, platform)

    def empty(self, shape: Sequence[int], dtype: str, device: str, *, pinned: bool = False) -> Tensor:
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=device, pin_memory=pinned)

    def seed(self, n: int) -> None:
        torch.manual_seed(n)


REFERENCE = _ReferenceKernels()


def _reference_ops() -> dict[str, Callable[..., Any]]:
    sources = (functional, sampling, adapters, CompositeOps(functional))
    return {name: next(getattr(s, name) for s in sources if hasattr(s, name)) for name in OP_VERSIONS}


REFERENCE_OPS = _reference_ops()
"""By op name: the function that runs where a platform brings none."""
