"""BERT, and RoBERTa and XLM-R, which have its form (config.json: BertModel, RobertaModel, XLMRobertaModel, and what
ends with ForSequenceClassification)."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.encoder import EncoderAttention, FeedForward
from anychip.model_config import ModelConfig
from anychip.models.encoder import Encoder, PostNormBlock
from anychip.plugin_api import EncoderSpec


class Bert(Encoder):
    prefix = "bert."

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[EncoderSpec]) -> None:
        reasons = []
        if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
            reasons.append(f"position_embedding_type {kind!r}; known is 'absolute'")
        if config.get("is_decoder"):
            reasons.append("is_decoder: its tokens do not see those behind them")
        if reasons:
            raise Unsupported(config.architecture, reasons)
        super().__init__(config, builder, specs)

    def block(self, builder: Builder, index: int, spec: EncoderSpec) -> PostNormBlock:
        config, name = self.config, f"{self.prefix}encoder.layer.{index}"
        return PostNormBlock(
            EncoderAttention(
                builder,
                names=[f"{name}.attention.self.{part}" for part in ("query", "key", "value")],
                output=f"{name}.attention.output.dense",
                index=index,
                spec=spec,
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
            ),
            self.layer_norm(builder, f"{name}.attention.output.LayerNorm"),
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


class Roberta(Bert):
    """Positions count on from the padding token's id. Its types of tokens are one, whatever the pair."""

    prefix = "roberta."

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[EncoderSpec]) -> None:
        self.first_position = int(config.get("pad_token_id", 1)) + 1
        super().__init__(config, builder, specs)
