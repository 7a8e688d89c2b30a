"""Falcon-H1: attention and a Mamba-2 mixer side by side in every layer, with multipliers everywhere
(config.json: FalconH1ForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anychip.layers.attention import Attention
from anychip.layers.build import Builder
from anychip.layers.mamba2 import Mamba2
from anychip.layers.mlp import GatedMLP
from anychip.model_config import ModelConfig
from anychip.models.bamba import Bamba
from anychip.models.hybrid import ATTENTION, STATE, Mixer
from anychip.plugin_api import ActFormat, CacheBackend, CacheSpec, ForwardContext, MeshShape, Rope, StepAdapters
from anychip.types import DType

BOTH = "hybrid"


class FalconH1(Bamba):
    partial_rotary = False

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> None:
        self.embedding_scale = float(config.get("embedding_multiplier", 1.0))
        self.head_scale = float(config.get("lm_head_multiplier", 1.0))
        super().__init__(config, builder, specs)

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        return [BOTH] * config.num_layers

    @classmethod
    def specs_of(
        cls, kind: str, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> Sequence[CacheSpec]:
        return [
            *super().specs_of(STATE, config, shape, dtype, kv_dtype),
            *super().specs_of(ATTENTION, config, shape, dtype, kv_dtype),
        ]

    def mixer(self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None) -> Mixer:
        config = self.config
        first = float(config.get("ssm_in_multiplier", 1.0))
        multipliers = [first * float(each) for each in config.get("ssm_multipliers") or (1.0,) * 5]
        normed = bool(config.get("mamba_rms_norm", False))
        mamba = self.mamba(
            builder,
            index,
            specs,
            at,
            norm_eps=config.norm_eps if normed else None,
            norm_first=bool(config.get("mamba_norm_before_gate", True)),
            output_bias=bool(config.get("projectors_bias", False)),
            multipliers=multipliers,
        )
        attention = self.self_attention(
            builder,
            index,
            specs[at + 2],
            rope,
            at=at + 2,
            bias=bool(config.get("attention_bias", False)),
            # Keys are multiplied before they turn, which multiplies their products with queries.
            scale=config.head_dim**-0.5 * float(config.get("key_multiplier", 1.0)),
        )
        return SideBySide(
            mamba,
            attention,
            builder.dtype,
            attention_in=float(config.get("attention_in_multiplier", 1.0)),
            attention_out=float(config.get("attention_out_multiplier", 1.0)),
            mamba_out=float(config.get("ssm_out_multiplier", 1.0)),
        )

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP:
        gate, down = self.config.get("mlp_multipliers") or (1.0, 1.0)
        bias = bool(self.config.get("mlp_bias", False))
        name = f"model.layers.{index}.feed_forward"
        return self.gated_mlp(builder, index, name=name, bias=bias, multipliers=(float(gate), float(down)))

    def logits(self, hidden: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        return super().logits(hidden, adapters) * self.head_scale


class SideBySide:
    """The sum of both mixers' outputs. Both read plain values."""

    def __init__(
        self,
        mamba: Mamba2,
        attention: Attention,
        dtype: DType,
        *,
        attention_in: float,
        attention_out: float,
        mamba_out: float,
    ) -> None:
        self.mamba, self.attention = mamba, attention
        self.accepts = ActFormat(dtype=dtype)
        self.attention_in, self.attention_out, self.mamba_out = attention_in, attention_out, mamba_out

    @property
    def backends(self) -> list[CacheBackend]:
        return [*self.mamba.backends, *self.attention.backends]

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        mixed = self.mamba(hidden, context) * self.mamba_out
        return mixed + self.attention(hidden * self.attention_in, context) * self.attention_out
