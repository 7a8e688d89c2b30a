"""The frame that encoders share: embeddings of tokens, places and texts, then layers in which all tokens of a sequence
see each other. They give hidden states; what vectors are made of them is told in the checkpoint's other files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.embedding import VocabParallelEmbedding
from anychip.layers.encoder import EncoderAttention, FeedForward, Table, activation_of
from anychip.layers.norm import LayerNorm
from anychip.model_config import ModelConfig
from anychip.plugin_api import FINAL, EncoderBackend, EncoderSpec, ForwardContext, MeshShape, Sharded
from anychip.types import DType

_HEADS = (
    "pooler.", "classifier.", "pre_classifier.", "cls.", "lm_head.", "head.", "score.", "vocab_transform.",
    "vocab_layer_norm.", "vocab_projector.", "decoder.",
)  # fmt: skip
"""What checkpoints hold behind the encoder: read by who applies a head (worker/vector_heads), or by nobody."""


class EncoderBlock(Protocol):
    @property
    def attention(self) -> EncoderAttention: ...

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Hidden states [num_tokens, hidden_size] before and behind the layer."""
        ...


class Encoder:
    """A family names its tensors, and overrides `block` and what else differs. It reads the fields of config.json that
    transformers' class of it reads."""

    prefix = ""
    """What the checkpoint's names begin with; one that was saved without a head leaves it out."""
    words = "embeddings.word_embeddings"
    embedding_norm = "embeddings.LayerNorm"
    positions: str | None = "embeddings.position_embeddings"
    """Of learned positions; None: there are none."""
    first_position = 0
    """Row of the first token's position."""
    token_types = True

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[EncoderSpec]) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.num_layers = config.num_layers
        self.hidden_size = size = config.hidden_size
        weights, prefix = builder.weights, self.prefix
        weights.decoder, weights.rename = prefix, _renamed
        weights.elsewhere += (*_HEADS, *(prefix + head for head in _HEADS))
        weights.ignored += ("embeddings.position_ids", "rotary_emb.inv_freq")
        self.embedding = VocabParallelEmbedding(
            builder, name=prefix + self.words, vocab_size=config.vocab_size, hidden_size=size
        )
        self.places: Table | None = None
        if self.positions is not None:
            rows = int(config.need("max_position_embeddings"))
            self.places = Table(builder, name=prefix + self.positions, rows=rows, size=size)
        self.types: Table | None = None
        num_types = int(config.get("type_vocab_size") or 0)
        if self.token_types and num_types:
            name = f"{prefix}embeddings.token_type_embeddings"
            self.types = Table(builder, name=name, rows=num_types, size=size)
        self.norm = self.layer_norm(builder, prefix + self.embedding_norm)
        self.blocks = [self.block(builder, index, specs[index]) for index in range(config.num_layers)]

    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> list[EncoderSpec]:
        """By layer, for one rank of a mesh; nothing is kept, so `kv_dtype` says nothing."""
        heads = Sharded(dim=0).count(config.num_heads, shape, "attention heads")
        spec = EncoderSpec(num_heads=heads, num_kv_heads=heads, head_dim=config.head_dim, dtype=dtype)
        return [spec] * config.num_layers

    @property
    def attention(self) -> list[EncoderBackend]:
        return [block.attention.backend for block in self.blocks]

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        return activation_of(self.config.architecture, str(self.config.get("hidden_act", "gelu")))

    def layer_norm(self, builder: Builder, name: str) -> LayerNorm:
        eps = float(self.config.get("layer_norm_eps", 1e-12))
        return LayerNorm(builder, name=name, size=self.hidden_size, eps=eps)

    def block(self, builder: Builder, index: int, spec: EncoderSpec) -> EncoderBlock:
        raise TypeError(f"{type(self).__name__} does not say what its layers are")

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        extras = context.extras
        hidden = self.embedding(input_ids)  # [num_tokens, hidden_size]
        if extras is not None:
            hidden = extras.embedded(hidden)
        if self.places is not None:
            hidden = hidden + self.places(positions + self.first_position)
        if self.types is not None:
            segments = None if extras is None else extras.segments
            hidden = hidden + (self.types.weight[0] if segments is None else self.types(segments))
        hidden = self.norm(hidden)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, context)
            if extras is not None:
                extras.seen(index, hidden)
        hidden = self.finished(hidden)
        if extras is not None:
            extras.seen(FINAL, hidden)
        return hidden

    def finished(self, hidden: Tensor) -> Tensor:
        """Behind the last layer."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Zeros [num_rows, vocab_size]: nothing is drawn, and programs of fixed shapes want something of this shape."""
        return hidden.new_zeros(len(hidden), self.vocab_size)


class PostNormBlock:
    """attention, sum, norm, feed-forward, sum, norm."""

    def __init__(
        self, attention: EncoderAttention, attention_norm: LayerNorm, mlp: FeedForward, mlp_norm: LayerNorm
    ) -> None:
        self.attention = attention
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        hidden = self.attention_norm(self.attention(hidden, context) + hidden)
        return self.mlp_norm(self.mlp(hidden) + hidden)


def _renamed(name: str) -> str:
    """Layer norms had other names in checkpoints of early years."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
