"""The frame that decoder-only families share: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from anychip.layers.attention import Attention
from anychip.layers.build import Builder
from anychip.layers.embedding import LMHead, VocabParallelEmbedding
from anychip.layers.latent import LatentAttention
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.layers.norm import LayerNorm, RMSNorm
from anychip.layers.plain_mlp import PlainMLP
from anychip.layers.rotary import make_rope
from anychip.layers.stage import StageLinks
from anychip.model_config import ModelConfig, rope_parameters
from anychip.models.config_kinds import known_activation
from anychip.plugin_api import (
    FINAL,
    KV_HEADS,
    Activation,
    AttentionSpec,
    CacheBackend,
    CacheSpec,
    ForwardContext,
    MeshShape,
    MoESpec,
    Rope,
    Sharded,
    StepAdapters,
)
from anychip.text_parts import OTHER_PARTS
from anychip.types import DType

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""By the names that checkpoints give them."""


class DecoderLayer(Protocol):
    @property
    def attention(self) -> Attention | LatentAttention: ...

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """(this layer's output before its residual sum, the residual) -> the same of the next."""
        ...


class Decoder:
    """A family overrides `layer`, and `layer_types` where its layers differ. A family reads the fields of config.json
    that transformers' class of it reads, and no others.

    A rank builds the layers of its stage: the first one looks embeddings up, the last one has the final norm and the
    head. `specs` are those of its layers."""

    activation_field = ("hidden_act", "silu")
    """The field that names the activation of feed-forward blocks, and its default."""
    attention_softcap = False
    partial_rotary = False
    embedding_scale: float | None = None
    """Rounded to the model's dtype before it is used, as the checkpoint was trained."""
    unit_offset_norm = False
    final_softcap: float | None = None

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[CacheSpec]) -> None:
        self.config = config
        self.ops = builder.ops
        self.vocab_size = config.vocab_size
        self.num_layers = config.num_layers
        self.hidden_size = config.hidden_size
        builder.weights.ignored += ("rotary_emb.inv_freq", ".k_scale", ".v_scale")
        if config.part_of is not None:
            builder.weights.elsewhere += OTHER_PARTS
            builder.weights.notes += (f"of {config.part_of} the text decoder is served: images and videos are refused",)
        self.stage = stage = builder.stage
        self.links = StageLinks(stage, builder.mesh.axis("pp"), config.hidden_size, builder.dtype)
        tied = config.tie_word_embeddings
        if tied and stage.count > 1:  # of several stages, the first and the last hold what is tied
            tied = builder.stored.tie(HEAD, EMBEDDING)
        self.embedding: VocabParallelEmbedding | None = None
        if stage.is_first or (stage.is_last and tied):
            self.embedding = VocabParallelEmbedding(
                builder,
                name=EMBEDDING,
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                adapts=stage.is_first,
            )
        if stage.count > 1:
            elsewhere = stage.held_elsewhere(config.num_layers, embedding=self.embedding is not None)
            builder.weights.elsewhere += elsewhere
        if self.embedding_scale is not None:
            # A number of the host: a tensor made in a step would be a copy to the device, which no capture takes.
            self.embedding_scale = rounded(self.embedding_scale, builder.dtype)
        rope = self.rope(builder)
        self.layers = self.build_layers(builder, specs, rope)
        self.norm: RMSNorm | LayerNorm | None = None
        self.head: LMHead | None = None
        if stage.is_last:
            self.norm = self.norm_layer(builder, config, "model.norm")
            if builder.draws:
                held, size = self.embedding if tied else None, config.hidden_size
                self.head = LMHead(builder, name=HEAD, vocab_size=self.vocab_size, hidden_size=size, tied=held)
        if not builder.draws:
            builder.weights.elsewhere += ("lm_head.", "score.")  # read for the vectors' head, if at all
        self.adapter_sites = builder.adapter_sites
        self.adapts_head = self.head is not None and self.head.site is not None
        self.expert_layers = builder.expert_layers

    @classmethod
    def norm_layer(cls, builder: Builder, config: ModelConfig, name: str) -> RMSNorm | LayerNorm:
        """Over hidden states, of checkpoint module `name`."""
        offset = cls.unit_offset_norm
        return RMSNorm(builder, name=name, size=config.hidden_size, eps=config.norm_eps, unit_offset=offset)

    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> Sequence[Any]:
        """The CacheSpec of every layer, for one rank of a mesh: full attention, or the window if `layer_types` says
        so."""
        softcap = config.get("attn_logit_softcapping") if cls.attention_softcap else None
        full = replace(full_attention(config, shape, dtype), kv_dtype=kv_dtype, softcap=softcap)
        windowed = replace(full, window=cls.window(config))
        return [windowed if kind == "sliding_attention" else full for kind in cls.layer_types(config)]

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        size = config.get("sliding_window")
        return None if size is None else int(size)

    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        """By layer, "full_attention" or "sliding_attention"."""
        return ["full_attention"] * config.num_layers

    @classmethod
    def caches_by_layer(cls, config: ModelConfig) -> list[int]:
        """How many of attention_specs belong to each layer."""
        return [1] * config.num_layers

    @property
    def attention(self) -> list[CacheBackend]:
        return [layer.attention.backend for layer in self.layers]

    def build_layers(self, builder: Builder, specs: Sequence[Any], rope: Any) -> list[Any]:
        return [self.layer(builder, index, specs[self.place(index)], rope) for index in self.held_layers]

    @property
    def held_layers(self) -> range:
        """The layers that this rank's stage holds."""
        return self.stage.layers(self.config.num_layers)

    def place(self, index: int) -> int:
        """Where what a layer keeps stands among what this rank's layers keep."""
        return index - self.stage.first_layer

    def rope(self, builder: Builder) -> Rope | None:
        """The rotary embedding that `layer` is given; None: the family has none."""
        device = builder.platform.default_device
        return make_rope(self.config, rope_parameters(self.config), device, partial=self.partial_rotary)

    @property
    def activation(self) -> Activation:
        return known_activation(self.config, *self.activation_field)

    def layer(self, builder: Builder, index: int, spec: Any, rope: Rope) -> DecoderLayer:
        """`index` counts from the model's first layer; `spec` is the one that attention_specs has for the layer."""
        raise TypeError(f"{type(self).__name__} does not say what its layers are")

    def self_attention(
        self,
        builder: Builder,
        index: int,
        spec: AttentionSpec,
        rope: Rope | None,
        *,
        at: int | None = None,
        **differences: Any,
    ) -> Attention:
        """Llama's attention, with a family's differences in layers.attention.Attention's arguments. `at` is the place
        of `spec` among this rank's, where that is not the layer's."""
        config = self.config
        settings: dict[str, Any] = {
            "scale": config.head_dim**-0.5,
            "name": f"model.layers.{index}.self_attn",
            **differences,
        }
        return Attention(
            builder,
            index=self.place(index) if at is None else at,
            spec=spec,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            rope=rope,
            **settings,
        )

    def gated_mlp(self, builder: Builder, index: int, **differences: Any) -> GatedMLP:
        """Llama's feed-forward block, with a family's differences in layers.mlp.GatedMLP's arguments."""
        settings: dict[str, Any] = {"name": f"model.layers.{index}.mlp", **differences}
        return GatedMLP(
            builder,
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            activation=self.activation,
            **settings,
        )

    def experts_spec(
        self, builder: Builder, *, num_experts: int, top_k: int, intermediate_size: int, **differences: Any
    ) -> MoESpec:
        """Experts as the feed-forward block is, each of this rank's share of `intermediate_size`; a family's
        differences in plugin_api.MoESpec's fields."""
        return MoESpec(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=self.config.hidden_size,
            intermediate_size=builder.expert_features(intermediate_size),
            dtype=builder.dtype,
            **{"activation": self.activation, **differences},
        )

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        extras = context.extras
        hidden = self.embedded(input_ids, context) if self.stage.is_first else self.links.receive(positions)
        residual: Tensor | None = None
        for index, layer in zip(self.held_layers, self.layers_over(hidden), strict=True):
            hidden, residual = layer(hidden, residual, context)
            if extras is not None:
                extras.seen(index, hidden, residual)
        assert residual is not None, "a stage has a layer"
        if self.norm is None:
            return self.links.pass_on(hidden, residual)
        final = self.norm.with_residual(hidden, residual)[0]
        if extras is not None:
            extras.seen(FINAL, final)
        return final

    def layers_over(self, hidden: Tensor) -> Sequence[Any]:
        """The layers that a step calls, the first of which reads `hidden`."""
        return self.layers

    def embedded(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """[num_tokens, hidden_size], for the first layer."""
        assert self.embedding is not None, "the first stage holds the embedding"
        hidden = self.embedding(input_ids, context.adapters)
        if self.embedding_scale is not None:
            hidden = hidden * self.embedding_scale
        return hidden if context.extras is None else context.extras.embedded(hidden)

    def logits(self, hidden: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        if self.head is None:
            return hidden.new_zeros(len(hidden), self.vocab_size)  # nothing is drawn; programs want the shape
        logits = self.head(hidden, adapters)
        return logits if self.final_softcap is None else self.ops.softcap(x=logits, cap=self.final_softcap)


def rounded(value: float, dtype: DType) -> float:
    """The nearest number that `dtype` has."""
    return float(torch.tensor(value, dtype=getattr(torch, dtype)))


PAGES_BY_HEAD = Sharded(dim=KV_HEADS, uneven="repeat")
"""Ranks share the KV heads; with more ranks than heads, neighbours hold the same head."""


def full_attention(config: ModelConfig, shape: MeshShape, dtype: DType) -> AttentionSpec:
    """One rank's share of plain causal attention."""
    return AttentionSpec(
        num_heads=Sharded(dim=0).count(config.num_heads, shape, "attention heads"),
        num_kv_heads=PAGES_BY_HEAD.count(config.num_kv_heads, shape, "key-value heads"),
        head_dim=config.head_dim,
        dtype=dtype,
        kv_dtype=dtype,
        pages=(PAGES_BY_HEAD,),
    )


class PreNormLayer:
    """norm, attention, norm, feed-forward, each pair around a residual sum. `norm` makes a norm of a checkpoint's
    module."""

    def __init__(
        self,
        builder: Builder,
        config: ModelConfig,
        index: int,
        attention: Attention | LatentAttention,
        mlp: GatedMLP | SparseMoE | PlainMLP,
        norm: Callable[[Builder, ModelConfig, str], RMSNorm | LayerNorm] = Decoder.norm_layer,
    ) -> None:
        name = f"model.layers.{index}"
        self.input_norm = norm(builder, config, f"{name}.input_layernorm")
        self.mlp_norm = norm(builder, config, f"{name}.post_attention_layernorm")
        self.attention = attention
        self.mlp = mlp

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm.with_residual(hidden, residual, self.attention.accepts)
        hidden = self.attention(hidden, context)
        hidden, residual = self.mlp_norm.with_residual(hidden, residual, self.mlp.accepts)
        return self.mlp(hidden, context), residual
