"""Calls of every backend at the sizes of models in use, on tensors without storage: what is compiled ahead and tuned.

Shapes are those of Llama-3.1-8B, Qwen2.5-0.5B (7 query heads to a key head), Gemma-2 (head_dim 256, softcap), Phi-3
(head_dim 96), GPT-OSS (sinks, windows) and Qwen3-30B-A3B (128 experts, 8 a token).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from anychip.plugin_api import (
    AttentionLayer,
    AttentionSpec,
    LinearPart,
    LinearSpec,
    MoESpec,
    Platform,
    QKNorm,
    QuantScheme,
    Rope,
)
from anychip_triton.attention import TritonAttention, TritonPlan
from anychip_triton.launch import Launcher
from anychip_triton.linear import linear_kernel
from anychip_triton.moe import TritonMoE
from anychip_triton.ops import TritonOps

Problem = Callable[[Launcher], None]

_PLACE = "meta"
_BLOCK_SIZE = 16
_MAX_PAGES = 512


def empty(shape: Sequence[int], dtype: str = "bfloat16") -> Tensor:
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=_PLACE)


class _Storage:
    """As much of a Platform as kernels ask for when they allocate weights."""

    def empty(self, shape: Sequence[int], dtype: str, tag: str) -> Tensor:
        return empty(shape, dtype)


_PLATFORM = cast(Platform, _Storage())


def attention(
    launch: Launcher,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    rows: int,
    queries: int,
    dtype: str = "bfloat16",
    kv_dtype: str = "",
    qk_norm: bool = False,
    **features: Any,
) -> None:
    """A layer's rotation, cache write and attention: `rows` sequences with `queries` tokens each."""
    spec = AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, dtype=cast(Any, dtype),
        kv_dtype=cast(Any, kv_dtype or dtype), **features,
    )  # fmt: skip
    backend = TritonAttention(spec, launch)
    tokens = rows * queries
    plan = TritonPlan(
        query_start=empty((rows + 1,), "int32"), seq_lens=empty((rows,), "int32"),
        block_table=empty((rows, _MAX_PAGES), "int32"), slot_mapping=empty((tokens,), "int64"),
        positions=empty((tokens,), "int32"), block_size=_BLOCK_SIZE, one_token=queries == 1,
    )  # fmt: skip
    narrow = bool(kv_dtype)
    layer = AttentionLayer(
        index=0, scale=dim**-0.5, ops=cast(Any, SimpleNamespace()),
        k_scale=empty((1,), "float32") if narrow else None, v_scale=empty((1,), "float32") if narrow else None,
        sinks=empty((heads,), "float32") if spec.sinks else None,
        alibi_slopes=empty((heads,), "float32") if spec.alibi else None,
    )  # fmt: skip
    cache = empty((64, 2, _BLOCK_SIZE, kv_heads, dim), "uint8" if narrow else dtype)
    q, k, v = (empty((tokens, count, dim), dtype) for count in (heads, kv_heads, kv_heads))
    rope = Rope(cos=empty((4096, dim // 2), "float32"), sin=empty((4096, dim // 2), "float32"), rotary_dim=dim)
    norm = QKNorm(q_weight=empty((dim,), dtype), k_weight=empty((dim,), dtype), eps=1e-6) if qk_norm else None
    backend.forward(q, k, v, cache, plan, layer, rope=rope, qk_norm=norm)


def product(
    launch: Launcher, *, rows: int, columns: int, features: int, scheme: QuantScheme | None = None,
    dtype: str = "bfloat16", bias: bool = False,
) -> None:  # fmt: skip
    spec = LinearSpec(
        in_features=columns, out_features=features, parts=(LinearPart(name="w", offset=0, rows=features),),
        dtype=cast(Any, dtype), bias=bias, scheme=scheme,
    )  # fmt: skip
    kernel = linear_kernel(spec, _PLATFORM, launch)
    kernel.apply(empty((rows, columns), dtype), kernel.begin())


def experts(launch: Launcher, *, tokens: int, scheme: QuantScheme | None = None, dtype: str = "bfloat16") -> None:
    spec = MoESpec(
        num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768, dtype=cast(Any, dtype), scheme=scheme
    )
    kernel = TritonMoE(spec, _PLATFORM, launch)
    logits = empty((tokens, spec.num_experts), dtype)
    kernel.experts(empty((tokens, spec.hidden_size), dtype), kernel.route(logits), kernel.begin())


def elementwise(launch: Launcher, *, dtype: str = "bfloat16") -> None:
    ops = TritonOps(launch)
    x, weight = empty((8, 4096), dtype), empty((4096,), dtype)
    ops.rms_norm(x=x, weight=weight, eps=1e-6)
    ops.residual_norm_quant(x=x, residual=x, weight=weight, eps=1e-6)
    for activation in ("silu", "gelu_tanh", "swiglu_clamped"):
        ops.gated_activation(gate_up=empty((8, 28672), dtype), activation=activation)


def drawing(launch: Launcher) -> None:
    ops, rows, vocab = TritonOps(launch), 8, 151_936
    logits = empty((rows, vocab), "float32")
    ops.apply_token_masks(logits=logits, masks=empty((rows, -(-vocab // 32)), "int32"))
    floats = {name: empty((rows,), "float32") for name in ("temperature", "top_p", "min_p")}
    integers = {
        name: empty((rows,), "int32") for name in ("top_k", "seed_low", "seed_high", "sample_index", "position")
    }
    for greedy in (False, True):
        ops.sample(logits=logits, all_greedy=greedy, **floats, **integers)


INT4 = QuantScheme(name="int4", scales="group", group_size=128, zero_points=True)
INT8 = QuantScheme(name="int8", scales="channel")
W8A8 = QuantScheme(name="int8-w8a8", scales="channel", activations="token")
FP8 = QuantScheme(name="fp8", scales="channel", activations="token")
FP8_BLOCKS = QuantScheme(name="fp8", scales="block", group_size=128, activations="group")
SCHEMES = (INT4, INT8, W8A8, FP8, FP8_BLOCKS)

_LLAMA = {"heads": 32, "kv_heads": 8, "dim": 128}
_LAYERS: tuple[dict[str, Any], ...] = (
    _LLAMA,
    _LLAMA | {"dtype": "float16"},
    _LLAMA | {"kv_dtype": "float8_e4m3fn"},
    _LLAMA | {"kv_dtype": "int8"},
    {"heads": 14, "kv_heads": 2, "dim": 64},
    {"heads": 32, "kv_heads": 4, "dim": 128, "qk_norm": True},
    {"heads": 8, "kv_heads": 4, "dim": 256, "softcap": 50.0, "window": 4096},
    {"heads": 32, "kv_heads": 32, "dim": 96},
    {"heads": 64, "kv_heads": 8, "dim": 64, "sinks": True, "window": 128},
    {"heads": 32, "kv_heads": 32, "dim": 128, "alibi": True},
    _LLAMA | {"dtype": "float32"},
)

_STEPS = ((1, 1), (128, 1), (4, 512))
"""Rows and tokens of each: one stream, a full batch, prompts."""

_PROJECTION = {"columns": 4096, "features": 6144}

PROBLEMS: tuple[Problem, ...] = (
    *(partial(attention, **layer, rows=rows, queries=count) for layer in _LAYERS for rows, count in _STEPS),
    *(partial(product, rows=rows, **_PROJECTION) for rows in (1, 16)),
    *(partial(product, rows=rows, scheme=s, **_PROJECTION) for s in SCHEMES for rows in (1, 16, 64, 512)),
    *(partial(experts, tokens=count, scheme=s) for s in (None, INT4, FP8, FP8_BLOCKS) for count in (1, 128, 4096)),
    partial(elementwise),
    partial(elementwise, dtype="float16"),
    drawing,
)

SAMPLE: tuple[Problem, ...] = (
    partial(attention, **_LLAMA, rows=1, queries=1),
    partial(attention, **_LLAMA, rows=4, queries=512),
    partial(product, rows=16, **_PROJECTION),
    partial(product, rows=512, scheme=FP8, **_PROJECTION),
    partial(product, rows=64, scheme=INT4, **_PROJECTION),
    partial(experts, tokens=4096),
    elementwise, drawing,
)  # fmt: skip
"""What CI compiles; `make check-full` compiles all."""
