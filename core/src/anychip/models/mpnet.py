"""MPNet: BERT's form, with a bias of each score by the distance of key and query, which all layers share (config.json:
MPNetModel, MPNetForMaskedLM, MPNetForSequenceClassification)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.encoder import EncoderAttention, FeedForward, relative_buckets
from anychip.model_config import ModelConfig
from anychip.models.encoder import Encoder, PostNormBlock
from anychip.plugin_api import EncoderSpec, MeshShape, WeightView
from anychip.types import DType

_BUCKETS = 32
_REACH = 128
"""Beyond this distance, all share one bucket."""


class MPNet(Encoder):
    prefix = "mpnet."
    token_types = False
    first_position = 2

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[EncoderSpec]) -> None:
        buckets, heads = int(config.get("relative_attention_num_buckets", _BUCKETS)), config.num_heads
        if buckets != _BUCKETS:
            raise Unsupported(config.architecture, [f"relative_attention_num_buckets {buckets}; known is {_BUCKETS}"])
        span = builder.split(heads, "attention heads")
        self.relative = builder.platform.empty((span.count, 2 * _REACH + 1), "float32", "weights")

        def load(view: WeightView) -> None:
            by_bucket = view.read((0, buckets), span.bounds).float()  # [buckets, num_heads]
            places = relative_buckets(torch.arange(-_REACH, _REACH + 1))
            self.relative.copy_(by_bucket[places].T)

        builder.weights.want(f"{self.prefix}encoder.relative_attention_bias.weight", (buckets, heads), load)
        super().__init__(config, builder, specs)

    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> list[EncoderSpec]:
        return [replace(spec, bias=True) for spec in super().attention_specs(config, shape, dtype, kv_dtype)]

    def block(self, builder: Builder, index: int, spec: EncoderSpec) -> PostNormBlock:
        config, name = self.config, f"{self.prefix}encoder.layer.{index}"
        return PostNormBlock(
            EncoderAttention(
                builder,
                names=[f"{name}.attention.attn.{part}" for part in "qkv"],
                output=f"{name}.attention.attn.o",
                index=index,
                spec=spec,
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
                relative=self.relative,
            ),
            self.layer_norm(builder, f"{name}.attention.LayerNorm"),
            FeedForward(
                builder,
                names=[f"{name}.intermediate.dense"],
                down=f"{name}.output.dense",
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                activation=self.activation,
            ),
            self.layer_norm(builder, f"{name}.output.LayerNorm"),
        )
