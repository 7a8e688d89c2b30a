"""ModernBERT: norms before each block, rotary positions, gated feed-forward, and windows in most layers (config.json:
ModernBertModel, ModernBertForSequenceClassification)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from anychip.errors import CheckpointError
from anychip.layers.build import Builder
from anychip.layers.encoder import EncoderAttention, FeedForward, activation_of
from anychip.layers.norm import LayerNorm
from anychip.layers.rotary import make_rope
from anychip.model_config import ModelConfig
from anychip.models.encoder import Encoder
from anychip.plugin_api import EncoderSpec, ForwardContext, MeshShape, Rope
from anychip.types import DType

_FULL, _WINDOWED = "full_attention", "sliding_attention"
_THETA = {_FULL: ("global_rope_theta", 160_000.0), _WINDOWED: ("local_rope_theta", 10_000.0)}


class ModernBert(Encoder):
    prefix = "model."
    words = "embeddings.tok_embeddings"
    embedding_norm = "embeddings.norm"
    positions = None
    token_types = False

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[EncoderSpec]) -> None:
        device = builder.platform.default_device
        self.kinds = layer_kinds(config)
        self.ropes = {kind: make_rope(config, rotary(config, kind), device) for kind in {*self.kinds}}
        super().__init__(config, builder, specs)
        self.final_norm = self.layer_norm(builder, f"{self.prefix}final_norm")

    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> list[EncoderSpec]:
        full = super().attention_specs(config, shape, dtype, kv_dtype)[0]
        windowed = replace(full, window=int(config.get("local_attention", 128)) // 2)
        return [windowed if kind == _WINDOWED else full for kind in layer_kinds(config)]

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        return activation_of(self.config.architecture, str(self.config.get("hidden_activation", "gelu")))

    def layer_norm(self, builder: Builder, name: str) -> LayerNorm:
        config = self.config
        eps, bias = float(config.get("norm_eps", 1e-5)), bool(config.get("norm_bias", False))
        return LayerNorm(builder, name=name, size=self.hidden_size, eps=eps, bias=bias)

    def block(self, builder: Builder, index: int, spec: EncoderSpec) -> PreNormBlock:
        config, name = self.config, f"{self.prefix}layers.{index}"
        rope: Rope = self.ropes[self.kinds[index]]
        return PreNormBlock(
            None if index == 0 else self.layer_norm(builder, f"{name}.attn_norm"),  # the embedding's norm serves
            EncoderAttention(
                builder,
                names=[f"{name}.attn.Wqkv"],
                output=f"{name}.attn.Wo",
                index=index,
                spec=spec,
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
                bias=bool(config.get("attention_bias", False)),
                rope=rope,
            ),
            self.layer_norm(builder, f"{name}.mlp_norm"),
            FeedForward(
                builder,
                names=[f"{name}.mlp.Wi"],
                down=f"{name}.mlp.Wo",
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                activation=self.activation,
                gated=True,
                bias=bool(config.get("mlp_bias", False)),
            ),
        )

    def finished(self, hidden: Tensor) -> Tensor:
        return self.final_norm(hidden)


class PreNormBlock:
    """norm, attention, sum, norm, feed-forward, sum."""

    def __init__(
        self,
        attention_norm: LayerNorm | None,
        attention: EncoderAttention,
        mlp_norm: LayerNorm,
        mlp: FeedForward,
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        normed = hidden if self.attention_norm is None else self.attention_norm(hidden)
        hidden = hidden + self.attention(normed, context)
        return hidden + self.mlp(self.mlp_norm(hidden))


def layer_kinds(config: ModelConfig) -> list[str]:
    """By layer, full or sliding attention. Raises CheckpointError for others, and for another number of layers."""
    every = int(config.get("global_attn_every_n_layers", 3))
    kinds = config.get("layer_types") or [_WINDOWED if at % every else _FULL for at in range(config.num_layers)]
    if len(kinds) < config.num_layers or not {*kinds} <= {_FULL, _WINDOWED}:
        raise CheckpointError(f"{config.folder}/config.json: layer_types {kinds} do not fit {config.num_layers} layers")
    return list(kinds[: config.num_layers])


def rotary(config: ModelConfig, kind: str) -> dict[str, Any]:
    """The rotary settings of layers of a kind."""
    name, default = _THETA[kind]
    given = (config.get("rope_parameters") or {}).get(kind) or {}
    return {"rope_type": "default", "rope_theta": config.get(name, default), **given}
