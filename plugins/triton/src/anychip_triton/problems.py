"""Calls of every backend at the sizes of models in use: compiled ahead on tensors without storage, tuned on a device.

Shapes are those of Llama-3.1-8B, Qwen2.5-0.5B (7 query heads to a key head), Gemma-2 (head_dim 256, softcap), Phi-3
(head_dim 96), GPT-OSS (sinks, windows) and Qwen3-30B-A3B (128 experts, 8 a token).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from anychip.ops.reference import blank_stacks
from anychip.plugin_api import (
    MAX_BIASES,
    ActFormat,
    Activation,
    AdaptedPart,
    AdapterSite,
    AttentionLayer,
    AttentionSpec,
    LinearPart,
    LinearSpec,
    MoESpec,
    Platform,
    QKNorm,
    QuantScheme,
    Rope,
    Span,
)
from anychip_triton.attention import TritonAttention, TritonPlan
from anychip_triton.launch import Launcher
from anychip_triton.linear import linear_kernel
from anychip_triton.low_rank import TritonLowRank
from anychip_triton.moe import TritonMoE
from anychip_triton.ops import TritonOps

Problem = Callable[..., None]
"""Called with a launcher and, for a device, where its tensors are."""


class _Storage:
    """As much of a Platform as kernels ask for when they allocate weights."""

    def __init__(self, place: str) -> None:
        self._place = place

    def empty(self, shape: Sequence[int], dtype: str, tag: str) -> Tensor:
        return _values(shape, dtype, self._place)


def storage(place: str) -> Platform:
    return cast(Platform, _Storage(place))


def _values(shape: Sequence[int], dtype: str, place: str) -> Tensor:
    """Zeros as integers, ids among them; else random numbers: a device that multiplies zeros draws less power, and is
    faster than it is with any other numbers."""
    kind = getattr(torch, dtype)
    if kind.is_floating_point and place != "meta":
        drawn = kind if kind.itemsize > 1 else torch.bfloat16  # nothing draws 8-bit floats
        return torch.randn(tuple(shape), dtype=drawn, device=place).to(kind)
    return torch.zeros(tuple(shape), dtype=kind, device=place)


def attention(
    launch: Launcher,
    place: str = "meta",
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    rows: int,
    queries: int,
    context: int = 1024,
    page: int | None = None,
    dtype: str = "bfloat16",
    kv_dtype: str = "",
    qk_norm: bool = False,
    **features: Any,
) -> None:
    """A layer's rotation, cache write and attention: `rows` sequences of `context` tokens, `queries` of them new."""
    spec = AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, dtype=cast(Any, dtype),
        kv_dtype=cast(Any, kv_dtype or dtype), **features,
    )  # fmt: skip
    values = partial(_values, place=place)
    page = page or launch.target.page
    tokens, pages = rows * queries, -(-context // page)
    int32 = {"dtype": torch.int32, "device": place}
    plan = TritonPlan(
        query_start=torch.arange(0, tokens + 1, queries, **int32),
        seq_lens=torch.full((rows,), context, **int32),
        block_table=torch.arange(rows * pages, **int32).view(rows, pages),
        slot_mapping=torch.arange(tokens, dtype=torch.int64, device=place),
        positions=torch.arange(context - queries, context, **int32).repeat(rows),
        block_size=page,
        one_token=queries == 1,
    )
    narrow = bool(kv_dtype)
    scale = torch.ones(1, device=place) if narrow else None
    layer = AttentionLayer(
        index=0, scale=dim**-0.5, ops=cast(Any, SimpleNamespace()), k_scale=scale, v_scale=scale,
        sinks=values((heads,), "float32") if spec.sinks else None,
        alibi_slopes=values((heads,), "float32") if spec.alibi else None,
    )  # fmt: skip
    cache = values((rows * pages, 2, page, kv_heads, dim), "uint8" if narrow else dtype)
    q, k, v = (values((tokens, count, dim), dtype) for count in (heads, kv_heads, kv_heads))
    angles = values((context, dim // 2), "float32")
    norm = QKNorm(q_weight=values((dim,), dtype), k_weight=values((dim,), dtype), eps=1e-6) if qk_norm else None
    rope = Rope(cos=angles, sin=angles, rotary_dim=dim)
    TritonAttention(spec, launch).forward(q, k, v, cache, plan, layer, rope=rope, qk_norm=norm)


def product(
    launch: Launcher,
    place: str = "meta",
    *,
    rows: int,
    columns: int,
    features: int,
    scheme: QuantScheme | None = None,
    dtype: str = "bfloat16",
    epilogue: str | None = None,
) -> None:
    """x W^T of a projection."""
    spec = LinearSpec(
        in_features=columns, out_features=features, parts=(LinearPart(name="w", offset=0, rows=features),),
        dtype=cast(Any, dtype), scheme=scheme, epilogue=epilogue,
    )  # fmt: skip
    kernel = linear_kernel(spec, storage(place), launch)
    kernel.apply(_values((rows, columns), dtype, place), kernel.begin())


def experts(
    launch: Launcher,
    place: str = "meta",
    *,
    tokens: int,
    scheme: QuantScheme | None = None,
    dtype: str = "bfloat16",
) -> None:
    """A mixture's routing, experts and sum, with tokens spread over the experts."""
    spec = MoESpec(
        num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768, dtype=cast(Any, dtype), scheme=scheme
    )
    kernel = TritonMoE(spec, storage(place), launch)
    logits = torch.randn((tokens, spec.num_experts), device=place).to(getattr(torch, dtype))
    kernel.experts(_values((tokens, spec.hidden_size), dtype, place), kernel.route(logits), kernel.begin())


def elementwise(launch: Launcher, place: str = "meta", *, dtype: str = "bfloat16") -> None:
    """Embedding, norms and activations."""
    ops = TritonOps(launch)
    ops.embedding(ids=_values((8,), "int32", place), weight=_values((32000, 4096), dtype, place))
    x, weight = _values((8, 4096), dtype, place), _values((4096,), dtype, place)
    ops.rms_norm(x=x, weight=weight, eps=1e-6)
    ops.residual_norm_quant(x=x, residual=x, weight=weight, eps=1e-6)
    for group in (None, 128):
        form = ActFormat(dtype=cast(Any, dtype), scheme="fp8", group_size=group)
        ops.residual_norm_quant(x=x, residual=x, weight=weight, eps=1e-6, out_format=form)
        ops.gate_up_act_quant(gate_up=_values((8, 28672), dtype, place), activation="silu", out_format=form)
    for activation in get_args(Activation):
        ops.gated_activation(gate_up=_values((8, 28672), dtype, place), activation=activation)


def drawing(launch: Launcher, place: str = "meta") -> None:
    """Edits, masks and draws over a large vocabulary."""
    ops, rows, vocab = TritonOps(launch), 8, 151_936
    values = partial(_values, place=place)
    logits = values((rows, vocab), "float32")
    ops.apply_token_masks(logits=logits, masks=values((rows, -(-vocab // 32)), "int32"))
    slots, counts = values((rows,), "int32"), values((rows + 1, vocab), "int32")
    penalties = {f"{name}_penalty": values((rows,), "float32") for name in ("repetition", "presence", "frequency")}
    ops.edit_logits(
        logits=logits, slots=slots, counts=counts, bias_ids=values((rows + 1, MAX_BIASES), "int32"),
        biases=values((rows + 1, MAX_BIASES), "float32"), num_biases=slots, **penalties,
    )  # fmt: skip
    ops.count_tokens(counts=counts, slots=slots, ids=slots)
    floats = {name: values((rows,), "float32") for name in ("temperature", "top_p", "min_p")}
    integers = {
        name: values((rows,), "int32") for name in ("top_k", "seed_low", "seed_high", "sample_index", "position")
    }
    for greedy in (False, True):
        ops.sample(logits=logits, all_greedy=greedy, **floats, **integers)


def adapters(launch: Launcher, place: str = "meta", *, tokens: int, dtype: str = "bfloat16", rank: int = 16) -> None:
    """Behind the product of queries, keys and values, with tokens spread over 16 adapters."""
    site = AdapterSite(
        index=0, in_features=4096, columns=Span(0, 4096), out_features=6144, dtype=cast(Any, dtype),
        parts=tuple(
            AdaptedPart(module=name, rows=rows, held=Span(0, rows), offset=offset)
            for name, rows, offset in (("q", 4096, 0), ("k", 1024, 4096), ("v", 1024, 5120))
        ),
    )  # fmt: skip
    values = partial(_values, place=place)
    (stack,) = blank_stacks([site], 16, rank, values)
    x, y = values((tokens, 4096), dtype), values((tokens, 6144), dtype)
    slots = torch.arange(tokens, dtype=torch.int32, device=place) % 16
    TritonLowRank(launch).add_low_rank(x=x, y=y, stack=stack, slots=slots)


INT4 = QuantScheme(values="int4", scales="group", group_size=128, zero_points="int")
INT8 = QuantScheme(values="int8", scales="channel")
W8A8 = QuantScheme(values="int8", scales="channel", activations="token")
FP8 = QuantScheme(values="fp8_e4m3", scales="channel", activations="token")
FP8_BLOCKS = QuantScheme(values="fp8_e4m3", scales="block", group_size=128, activations="group")
FEW = tuple(
    QuantScheme(values=values, scales="group", group_size=size, activations="group")
    for values in ("int8", "fp8_e4m3")
    for size in (16, 48)
)
"""Of groups in which no tile has as many columns as products of 8 bits take."""

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
    *(partial(product, rows=1, epilogue=activation, **_PROJECTION) for activation in get_args(Activation)),
    *(partial(product, rows=rows, scheme=s, **_PROJECTION) for s in SCHEMES for rows in (1, 16, 64, 512)),
    *(partial(product, rows=rows, scheme=s, columns=960, features=512) for s in FEW for rows in (1, 64)),
    *(partial(experts, tokens=1, scheme=s) for s in FEW),
    *(partial(experts, tokens=count, scheme=s) for s in (None, INT4, FP8, FP8_BLOCKS) for count in (1, 128, 4096)),
    *(partial(adapters, tokens=count, rank=rank) for count in (1, 128, 4096) for rank in (8, 16, 64, 256)),
    *(partial(adapters, tokens=count, dtype=dtype) for count in (1, 4096) for dtype in ("float16", "float32")),
    partial(elementwise),
    partial(elementwise, dtype="float16"),
    drawing,
)

SAMPLE: tuple[Problem, ...] = (
    partial(attention, **_LLAMA, rows=1, queries=1),
    partial(attention, **_LLAMA, rows=4, queries=512),
    partial(product, rows=16, **_PROJECTION),
    partial(product, rows=1, epilogue="silu", **_PROJECTION),
    partial(product, rows=1, scheme=FEW[-1], columns=96, features=64),
    partial(product, rows=512, scheme=FP8, **_PROJECTION),
    partial(product, rows=64, scheme=INT4, **_PROJECTION),
    partial(experts, tokens=4096),
    partial(adapters, tokens=4096),
    elementwise, drawing,
)  # fmt: skip
"""What CI compiles; `make check-full` compiles all."""
