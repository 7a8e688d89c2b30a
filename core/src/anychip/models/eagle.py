"""EAGLE heads: a few decoder layers over a token's embedding and the hidden states of the token before it.

At position i a head takes the id of token i + 1 and the *feature* of token i: hidden states of the target, joined by
`join`, or what the head itself made of the position before, which it shows as its tap. It says what token i + 2 is.
EAGLE-1: arXiv 2401.15077. EAGLE-3: arXiv 2503.01840.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from anychip.errors import ConfigError
from anychip.head_config import HeadConfig
from anychip.layers.attention import Attention
from anychip.layers.build import Builder
from anychip.layers.embedding import LMHead, VocabParallelEmbedding
from anychip.layers.linear import ReplicatedLinear
from anychip.layers.mlp import GatedMLP
from anychip.layers.norm import RMSNorm
from anychip.layers.rotary import make_rope
from anychip.model_config import ModelConfig, rope_parameters
from anychip.models.config_kinds import known_activation
from anychip.models.decoder import full_attention
from anychip.models.head_parts import (
    OWN_TAP,
    FollowingHead,
    HeadFamily,
    TargetParts,
    drafted_ids,
    extras_of,
    features_of,
)
from anychip.plugin_api import (
    AttentionBackend,
    AttentionSpec,
    ForwardContext,
    MeshShape,
    Rope,
    StepModel,
)
from anychip.types import DType


class EagleHead(FollowingHead):
    """What both kinds share."""

    def __init__(self, config: HeadConfig, builder: Builder, borrowed: TargetParts | None, own: frozenset[str]) -> None:
        model = config.model
        super().__init__(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            borrowed=borrowed,
        )
        builder.weights.rename = _wanted_name
        builder.weights.ignored += ("rotary_emb.inv_freq", "t2d")
        self.embedding: VocabParallelEmbedding | None = None
        if "embed_tokens.weight" in own:
            self.embedding = VocabParallelEmbedding(
                builder, name="embed_tokens", vocab_size=model.vocab_size, hidden_size=model.hidden_size
            )
        self.layers: list[HeadLayer] = []

    @property
    def attention(self) -> list[AttentionBackend]:
        return [layer.attention.backend for layer in self.layers]

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) if self.embedding is None else self.embedding(ids)


class Eagle1(EagleHead):
    """A projection of embedding and feature, then decoder layers of which the first has no norm. No final norm: what
    comes out stands for the target's normed hidden states, and the target's own head reads it."""

    def __init__(
        self,
        config: HeadConfig,
        builder: Builder,
        specs: Sequence[AttentionSpec],
        borrowed: TargetParts | None,
        own: frozenset[str],
    ) -> None:
        super().__init__(config, builder, borrowed, own - {"embed_tokens.weight"})
        builder.weights.ignored += ("embed_tokens.weight", "lm_head.weight")  # copies of the target's
        size = self.hidden_size
        self.fc = ReplicatedLinear(builder, name="fc", in_features=2 * size, out_features=size, bias="fc.bias" in own)
        rope = _rope(config.model, builder)
        self.layers = [
            HeadLayer(builder, config.model, f"layers.{index}", index, spec, rope, own=own, has_input_norm=index > 0)
            for index, spec in enumerate(specs)
        ]

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        extras, embedded = extras_of(context), self.embed(input_ids)
        hidden = self.fc(torch.cat((embedded, features_of(extras, embedded)), dim=-1))
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, context)
        made = hidden if residual is None else hidden + residual  # [num_tokens, hidden_size]
        extras.seen(OWN_TAP, made)
        return made


class Eagle3(EagleHead):
    """One decoder layer whose attention reads embedding and feature side by side, each behind a norm of its own."""

    def __init__(
        self,
        config: HeadConfig,
        builder: Builder,
        specs: Sequence[AttentionSpec],
        borrowed: TargetParts | None,
        own: frozenset[str],
    ) -> None:
        super().__init__(config, builder, borrowed, own)
        model, size = config.model, self.hidden_size
        self.fc = ReplicatedLinear(
            builder, name="fc", in_features=len(config.taps) * size, out_features=size, bias="fc.bias" in own
        )
        name = "layers.0" if "layers.0.hidden_norm.weight" in own else "midlayer"
        self.layers = [HeadLayer(builder, model, name, 0, specs[0], _rope(model, builder), own=own, reads=2 * size)]
        self.feature_norm = RMSNorm(builder, name=f"{name}.hidden_norm", size=size, eps=model.norm_eps)
        self.norm = RMSNorm(builder, name="norm", size=size, eps=model.norm_eps)
        self.head = LMHead(builder, name="lm_head", vocab_size=config.num_draft_tokens, hidden_size=size, tied=None)
        self.ids: Tensor | None = None
        if config.num_draft_tokens < model.vocab_size:
            self.ids = drafted_ids(builder, "d2t", config.num_draft_tokens, model.vocab_size, are_offsets=True)
        else:
            builder.weights.ignored += ("d2t",)

    def join(self, taps: Sequence[Tensor]) -> Tensor:
        return self.fc(torch.cat(tuple(taps), dim=-1))

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        extras, embedded = extras_of(context), self.embed(input_ids)
        features, layer = features_of(extras, embedded), self.layers[0]
        assert layer.input_norm is not None, "the layer of an EAGLE-3 head has a norm for embeddings"
        read = torch.cat((layer.input_norm(embedded), self.feature_norm(features)), dim=-1)
        hidden, residual = layer.behind_norm(read, features, context)
        final, made = self.norm.with_residual(hidden, residual)
        extras.seen(OWN_TAP, made)
        return final

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        if self.ids is None:
            return logits
        return logits.new_full((len(logits), self.vocab_size), float("-inf")).index_copy_(1, self.ids, logits)


class HeadLayer:
    """Llama's layer, with the biases that are among the checkpoint's `own` tensors. `reads`: features of what its
    attention reads, where that is not the hidden state."""

    def __init__(
        self,
        builder: Builder,
        config: ModelConfig,
        name: str,
        index: int,
        spec: AttentionSpec,
        rope: Rope,
        *,
        own: frozenset[str],
        has_input_norm: bool = True,
        reads: int | None = None,
    ) -> None:
        size, eps = config.hidden_size, config.norm_eps
        self.input_norm: RMSNorm | None = None
        if has_input_norm:
            self.input_norm = RMSNorm(builder, name=f"{name}.input_layernorm", size=size, eps=eps)
        self.mlp_norm = RMSNorm(builder, name=f"{name}.post_attention_layernorm", size=size, eps=eps)
        self.attention = Attention(
            builder,
            name=f"{name}.self_attn",
            index=index,
            spec=spec,
            hidden_size=size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            scale=config.head_dim**-0.5,
            rope=rope,
            bias=f"{name}.self_attn.q_proj.bias" in own,
            output_bias=f"{name}.self_attn.o_proj.bias" in own,
            input_size=reads,
        )
        self.mlp = GatedMLP(
            builder,
            name=f"{name}.mlp",
            hidden_size=size,
            intermediate_size=config.intermediate_size,
            activation=known_activation(config, "hidden_act", "silu"),
        )

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """As models.decoder.DecoderLayer."""
        if self.input_norm is None:
            return self.behind_norm(hidden, hidden, context)
        read, residual = self.input_norm.with_residual(hidden, residual, self.attention.accepts)
        return self.behind_norm(read, residual, context)

    def behind_norm(self, read: Tensor, residual: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden = self.attention(read, context)
        hidden, residual = self.mlp_norm.with_residual(hidden, residual, self.mlp.accepts)
        return self.mlp(hidden, None), residual


class EagleFamily(HeadFamily):
    """Of one head. `names` are its checkpoint's tensors; empty where weights are made up."""

    def __init__(self, config: HeadConfig, names: frozenset[str]) -> None:
        self.config = config
        self.own = frozenset(map(_wanted_name, names))
        if names and "fc.weight" not in self.own:
            raise ConfigError(
                f"--speculate eagle: {config.model.folder} is no {config.kind} head: it has no tensor fc.weight"
            )

    def attention_specs(
        self, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> Sequence[AttentionSpec]:
        spec = replace(full_attention(config, shape, dtype), kv_dtype=kv_dtype)
        return [spec] * config.num_layers

    def __call__(self, config: ModelConfig, builder: Builder, specs: Sequence[AttentionSpec]) -> StepModel:
        made = msgspec.structs.replace(self.config, model=config)
        build = Eagle3 if made.kind == "EAGLE-3" else Eagle1
        return build(made, builder, specs, self.target, self.own)


def _rope(config: ModelConfig, builder: Builder) -> Rope:
    return make_rope(config, rope_parameters(config), builder.platform.default_device)


def _wanted_name(name: str) -> str:
    """Some checkpoints begin all names with `model.`."""
    return name.removeprefix("model.")
