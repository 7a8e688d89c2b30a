"""Mamba: selective scans, one behind the other, and nothing else (config.json: MambaForCausalLM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anychip.layers.build import Builder
from anychip.layers.mamba import Mamba, MambaSizes
from anychip.model_config import ModelConfig
from anychip.models.hybrid import BlockLayer, need_silu
from anychip.models.mamba2 import Mamba2LM
from anychip.plugin_api import MeshShape, Rope, StateSpec
from anychip.types import DType


class MambaLM(Mamba2LM):
    @classmethod
    def mamba_sizes(cls, config: ModelConfig) -> MambaSizes:
        rank = config.get("time_step_rank", "auto")
        return MambaSizes(
            channels=int(config.need("expand") * config.hidden_size),
            state_dim=int(config.need("state_size")),
            dt_rank=math.ceil(config.hidden_size / 16) if rank == "auto" else int(rank),
            width=int(config.need("conv_kernel")),
        )

    @classmethod
    def state_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        return cls.mamba_sizes(config).specs(shape, dtype)

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        config, name = self.config, f"model.layers.{index}"
        need_silu(config)
        mixer = Mamba(
            builder,
            name=f"{name}.mixer",
            index=at,
            specs=specs[at : at + 2],
            sizes=self.mamba_sizes(config),
            hidden_size=config.hidden_size,
            bias=bool(config.get("use_bias")),
            conv_bias=bool(config.get("use_conv_bias")),
        )
        return BlockLayer(builder, config, name, mixer=("norm", mixer))
