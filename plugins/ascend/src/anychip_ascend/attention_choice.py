"""Which attention serves a layer on which generation, and why: the table that attention.py follows and doctor prints.

The fused op has two ways through CANN on Atlas A2 and A3. In TND layout over pages it takes the general one ("split
fuse") for grouped queries: `IsUsingFAI` in ops-transformer's fused_infer_attention_score_tiling.cpp. What does not pass
there meets the limits that aclnnFusedInferAttentionScoreV4.md gives for TND. Neither torch nor the vendor's runtime is
imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anychip.plugin_api import AttentionSpec
from anychip_ascend.generations import FUSED_ATTENTION, Generation

BLOCK_SIZE = 128
MAX_GROUPED_DIM = 256
"""Of the general way, for grouped queries."""

DOCUMENTED_DIM = 128
"""Of the other way: queries, keys and values of bfloat16."""

FUSED_LIMITS = (
    "attention runs on the reference with soft caps, ALiBi or float32, and with windows, sinks or as many KV heads as "
    f"query heads unless it is bfloat16 of head_dim {DOCUMENTED_DIM}"
)
"""In words, for doctor, which has no model to ask about."""

MAX_GROUP = 64
"""Query heads to a key-value head."""

_DIM_STEP = 16
_MAX_PAGE_ELEMENTS = 65535
"""KV heads times head_dim, in pages of [block_size, heads * head_dim]."""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """`op` serves; `why` says under which rule, or what the vendor's op lacks."""

    op: Literal["npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2", "reference"]
    why: str


def choose_attention(spec: AttentionSpec, generation: Generation) -> AttentionChoice:
    """The fused op where its documents and CANN's own checks admit the layer; core's reference elsewhere."""
    if lacking := _lacks(spec, generation):
        return AttentionChoice("reference", lacking)
    dim, grouped = spec.head_dim, spec.num_heads > spec.num_kv_heads
    if grouped and not spec.sinks and spec.window is None and dim <= MAX_GROUPED_DIM:
        return AttentionChoice(FUSED_ATTENTION, f"grouped queries, causal, head_dim {dim} up to {MAX_GROUPED_DIM}")
    asks = "sinks" if spec.sinks else "a window" if spec.window is not None else "as many KV heads as query heads"
    if dim != DOCUMENTED_DIM or spec.dtype != "bfloat16":
        return AttentionChoice(
            "reference", f"{asks}, where the op takes bfloat16 of head_dim {DOCUMENTED_DIM}; here {spec.dtype} of {dim}"
        )
    if spec.sinks:
        return AttentionChoice("npu_fused_infer_attention_score_v2", "learnable_sink, which the first version has not")
    return AttentionChoice(FUSED_ATTENTION, f"{asks}: bfloat16 of head_dim {DOCUMENTED_DIM}")


def _lacks(spec: AttentionSpec, generation: Generation) -> str:
    """What rules the fused op out on any way; "" where nothing does."""
    if FUSED_ATTENTION in generation.lacks:
        return f"{generation.name} has no {FUSED_ATTENTION}"
    if spec.softcap is not None:
        return "the op has no soft cap of scores"
    if spec.alibi:
        return "the op's position bias does not go with pages"
    if spec.invariant or spec.lse:
        return "the op promises no batch invariance, and its log-sum-exp is not used"
    if spec.dtype not in ("float16", "bfloat16") or spec.kv_dtype != spec.dtype:
        return f"the op takes float16 and bfloat16 over a cache of the same, here {spec.dtype} over {spec.kv_dtype}"
    if spec.head_dim % _DIM_STEP:
        return f"head_dim {spec.head_dim} is no multiple of {_DIM_STEP}"
    if spec.num_kv_heads * spec.head_dim > _MAX_PAGE_ELEMENTS:
        return f"{spec.num_kv_heads} KV heads of {spec.head_dim}: a token has {_MAX_PAGE_ELEMENTS} values at most"
    if spec.num_heads % spec.num_kv_heads or spec.num_heads // spec.num_kv_heads > MAX_GROUP:
        return f"{spec.num_heads} query heads to {spec.num_kv_heads}: a group has {MAX_GROUP} at most"
    return ""
