"""Mamba-2: a state layer after the other, and nothing else (config.json: Mamba2ForCausalLM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from anychip.layers.build import Builder
from anychip.layers.mamba2 import Mamba2, Mamba2Sizes
from anychip.model_config import ModelConfig
from anychip.models.hybrid import STATE, BlockLayer, Hybrid, need_silu
from anychip.plugin_api import Rope

BACKBONE = MappingProxyType(
    {
        "model.embeddings.": "model.embed_tokens.",
        "model.embedding.": "model.embed_tokens.",  # of older checkpoints
        "model.norm_f.": "model.norm.",
    }
)


class Mamba2LM(Hybrid):
    rotates = False
    prefix = "backbone."
    renamed = BACKBONE

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        return [STATE] * config.num_layers

    @classmethod
    def sizes(cls, config: ModelConfig) -> Mamba2Sizes:
        return Mamba2Sizes(
            heads=int(config.need("num_heads")),
            head_dim=int(config.need("head_dim")),
            state_dim=int(config.need("state_size")),
            groups=int(config.need("n_groups")),
            width=int(config.need("conv_kernel")),
        )

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        config, name = self.config, f"model.layers.{index}"
        need_silu(config)
        mixer = Mamba2(
            builder,
            name=f"{name}.mixer",
            index=at,
            specs=specs[at : at + 2],
            sizes=self.sizes(config),
            hidden_size=config.hidden_size,
            norm_eps=config.norm_eps,
            bias=bool(config.get("use_bias")),
            conv_bias=bool(config.get("use_conv_bias")),
            dt_limits=dt_limits(config),
        )
        return BlockLayer(builder, config, name, mixer=("norm", mixer))


def dt_limits(config: ModelConfig) -> tuple[float, float]:
    """time_step_limit, which JSON has no number for where it is infinite."""
    low, high = config.get("time_step_limit") or (0.0, math.inf)
    return float(low), math.inf if high is None or isinstance(high, dict) else float(high)
