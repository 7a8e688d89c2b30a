"""The head that a checkpoint has for itself (MTP): a layer of the model's own kind, over a token's embedding and the
final hidden state of the token before it. DeepSeek-V3: arXiv 2412.19437, section 2.2.

It is used once for each guess: what it makes of a position, behind its norm, stands for the target's final hidden state
at the next one. Embedding and output head are the target's; a checkpoint may hold copies of both, which are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor

from anychip.errors import ConfigError
from anychip.head_config import HeadConfig
from anychip.layers.build import Builder
from anychip.layers.linear import ReplicatedLinear
from anychip.layers.norm import RMSNorm
from anychip.layers.stage import Stage
from anychip.model_config import ModelConfig
from anychip.models.decoder import Decoder
from anychip.models.head_parts import OWN_TAP, FollowingHead, HeadFamily, TargetParts, extras_of, features_of
from anychip.plugin_api import CacheBackend, CacheSpec, ForwardContext, MeshShape, StepModel
from anychip.types import DType


class MtpHead(FollowingHead):
    """`family` builds its decoder layer, as one of the model's."""

    def __init__(
        self,
        config: HeadConfig,
        builder: Builder,
        family: type[Decoder],
        specs: Sequence[CacheSpec],
        borrowed: TargetParts | None,
    ) -> None:
        model, size = config.model, config.model.hidden_size
        super().__init__(vocab_size=model.vocab_size, hidden_size=size, num_layers=1, borrowed=borrowed)
        name = f"model.layers.{config.layer}"
        builder.weights.elsewhere += (f"{name}.embed_tokens.", f"{name}.shared_head.head.")

        def norm(part: str) -> RMSNorm:
            offset = family.unit_offset_norm
            return RMSNorm(builder, name=f"{name}.{part}", size=size, eps=model.norm_eps, unit_offset=offset)

        self.embedding_norm, self.feature_norm = norm("enorm"), norm("hnorm")
        self.projection = ReplicatedLinear(builder, name=f"{name}.eh_proj", in_features=2 * size, out_features=size)
        # A decoder that is neither a pipeline's first stage nor its last has layers, and nothing around them.
        middle = Stage(index=1, count=3, first_layer=config.layer, end_layer=config.layer + 1)
        self.layers = family(model, replace(builder, stage=middle), specs).layers
        self.norm = norm("shared_head.norm")

    @property
    def attention(self) -> list[CacheBackend]:
        return [layer.attention.backend for layer in self.layers]

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        extras, embedded = extras_of(context), self.embed(input_ids)
        features = features_of(extras, embedded)
        joined = torch.cat((self.embedding_norm(embedded), self.feature_norm(features)), dim=-1)
        hidden, residual = self.layers[0](self.projection(joined), None, context)
        made = self.norm.with_residual(hidden, residual)[0]  # [num_tokens, hidden_size]
        extras.seen(OWN_TAP, made)
        return made


class MtpFamily(HeadFamily):
    """Of the head of a model that `family` builds. `names` are the checkpoint's tensors; empty where weights are made
    up. Raises ConfigError where it has none for the head, or is built by other code."""

    def __init__(self, config: HeadConfig, family: object, names: frozenset[str]) -> None:
        self.config = config
        model, module = config.model, f"layers.{config.layer}.eh_proj."
        if not (isinstance(family, type) and issubclass(family, Decoder)):
            raise ConfigError(
                f"--speculate mtp: {model.architecture} of {model.folder} runs in transformers' code; heads need a "
                "model of a native family"
            )
        if names and not any(module in name for name in names):
            raise ConfigError(
                f"--speculate mtp: config.json of {model.folder} names {model.num_layers - config.layer} layers that "
                f"predict further tokens, and its files have no {module}weight: this copy was saved without them"
            )
        self.family = family

    def attention_specs(self, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> Sequence[Any]:
        layer = self.config.layer
        return self.family.attention_specs(config, shape, dtype, kv_dtype)[layer : layer + 1]

    def __call__(self, config: ModelConfig, builder: Builder, specs: Sequence[CacheSpec]) -> StepModel:
        made = msgspec.structs.replace(self.config, model=config)
        return MtpHead(made, builder, self.family, specs, self.target)
