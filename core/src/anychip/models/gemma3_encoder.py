"""EmbeddingGemma: Gemma 3 whose tokens all see each other, within windows to both sides in most layers (config.json:
Gemma3TextModel with use_bidirectional_attention)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from anychip.layers.norm import RMSNorm
from anychip.model_config import ModelConfig
from anychip.models.gemma2 import SandwichLayer
from anychip.models.gemma3 import Gemma3
from anychip.plugin_api import ActFormat, EncoderLayer, EncoderSpec, ForwardContext, MeshShape, Rope, Sharded
from anychip.types import DType

_KV_HEADS = Sharded(dim=0, uneven="repeat")
"""With more ranks than heads, neighbours hold the same head."""


class EmbeddingGemma(Gemma3):
    sees_all = True

    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> Sequence[Any]:
        """By layer, for one rank of a mesh; nothing is kept, so `kv_dtype` says nothing."""
        full = EncoderSpec(
            num_heads=Sharded(dim=0).count(config.num_heads, shape, "attention heads"),
            num_kv_heads=_KV_HEADS.count(config.num_kv_heads, shape, "key-value heads"),
            head_dim=config.head_dim,
            dtype=dtype,
        )
        window = cls.window(config)
        # The file counts both sides.
        windowed = full if window is None else replace(full, window=window // 2)
        return [windowed if kind == "sliding_attention" else full for kind in cls.layer_types(config)]

    def layer(self, builder: Builder, index: int, spec: Any, rope: Rope) -> SandwichLayer:
        config = self.config
        attention = WholeAttention(
            builder,
            name=f"model.layers.{index}.self_attn",
            index=index,
            spec=spec,
            config=config,
            rope=rope if spec.window is None else self.local_rope,
        )
        return SandwichLayer(builder, config, index, attention, self.gated_mlp(builder, index))


class WholeAttention:
    """Gemma 3's attention, of encoders: norms on queries and keys, then every token of the sequence."""

    def __init__(
        self, builder: Builder, *, name: str, index: int, spec: EncoderSpec, config: ModelConfig, rope: Rope
    ) -> None:
        dim, size, bias = spec.head_dim, config.hidden_size, bool(config.get("attention_bias", False))
        heads, kv_heads = (Sharded(dim=0, unit=dim),), (replace(_KV_HEADS, unit=dim),)
        rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
        self.qkv = ColumnParallelLinear(
            builder,
            in_features=size,
            projections=[
                Projection("q", f"{name}.q_proj", rows, heads),
                Projection("k", f"{name}.k_proj", kv_rows, kv_heads),
                Projection("v", f"{name}.v_proj", kv_rows, kv_heads),
            ],
            bias=bias,
        )
        self.output = RowParallelLinear(
            builder,
            name=f"{name}.o_proj",
            in_features=rows,
            placed=(Sharded(dim=1, unit=dim),),
            out_features=size,
            bias=bias,
        )
        self.q_norm, self.k_norm = (
            RMSNorm(builder, name=f"{name}.{which}_norm", size=dim, eps=config.norm_eps, unit_offset=True)
            for which in "qk"
        )
        self.heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        self.head_dim = dim
        self.backend = builder.platform.encoder(spec)
        scale = float(config.get("query_pre_attn_scalar", dim)) ** -0.5
        self.layer = EncoderLayer(index=index, scale=scale, ops=builder.ops)
        self.rope = rope

    @property
    def accepts(self) -> ActFormat:
        return self.qkv.accepts

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, self.head_dim).split_with_sizes(self.heads, dim=1)
        attended = context.encode(self.backend, self.layer, self.q_norm(q), self.k_norm(k), v, rope=self.rope)
        return self.output(attended.flatten(1))
