"""DistilBERT (config.json: DistilBertModel, DistilBertForSequenceClassification)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.encoder import EncoderAttention, FeedForward
from anychip.models.encoder import Encoder, PostNormBlock
from anychip.plugin_api import EncoderSpec


class DistilBert(Encoder):
    prefix = "distilbert."
    token_types = False

    def block(self, builder: Builder, index: int, spec: EncoderSpec) -> PostNormBlock:
        config, name = self.config, f"{self.prefix}transformer.layer.{index}"
        return PostNormBlock(
            EncoderAttention(
                builder,
                names=[f"{name}.attention.{part}_lin" for part in "qkv"],
                output=f"{name}.attention.out_lin",
                index=index,
                spec=spec,
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
            ),
            self.layer_norm(builder, f"{name}.sa_layer_norm"),
            FeedForward(
                builder,
                names=[f"{name}.ffn.lin1"],
                down=f"{name}.ffn.lin2",
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                activation=self.activation,
            ),
            self.layer_norm(builder, f"{name}.output_layer_norm"),
        )
