"""MiniMax-01: lightning attention with full attention between, residual sums of normed inputs, experts
(config.json: MiniMaxForCausalLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anychip.layers.build import Builder
from anychip.layers.lightning import LightningAttention, slopes
from anychip.layers.moe import SparseMoE
from anychip.layers.norm import RMSNorm
from anychip.model_config import ModelConfig
from anychip.models.hybrid import ATTENTION, STATE, Hybrid, Mixer, known_kinds, need_silu
from anychip.models.mixtral import experts
from anychip.plugin_api import CacheBackend, ForwardContext, MeshShape, Rope, Sharded, StateSpec, state_spec
from anychip.types import DType


class MiniMax(Hybrid):
    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        if config.get("layer_types") is not None:
            return known_kinds(config, "layer_types")
        return [STATE if index % 2 else ATTENTION for index in range(config.num_layers)]

    @classmethod
    def state_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        heads = Sharded(dim=0).count(config.num_heads, shape, "heads of lightning attention")
        return [state_spec("lightning", dtype, heads=heads, key_dim=config.head_dim, value_dim=config.head_dim)]

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> Any:
        config, name = self.config, f"model.layers.{index}"
        need_silu(config)
        mixer: Mixer
        if kind == ATTENTION:
            mixer = self.self_attention(builder, index, specs[at], rope, at=at)
        else:
            builder.weights.ignored += (".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay")
            mixer = LightningAttention(
                builder,
                name=f"{name}.self_attn",
                index=at,
                spec=specs[at],
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                slopes=slopes(config.num_heads, index, int(config.need("num_hidden_layers"))),
            )
        return MiniMaxLayer(builder, config, name, kind, mixer, experts(self, builder, index))


class MiniMaxLayer:
    """norm, mixer, norm, experts. What is added to a block's output is the block's own input, behind its norm."""

    def __init__(
        self, builder: Builder, config: ModelConfig, name: str, kind: str, mixer: Mixer, experts: SparseMoE
    ) -> None:
        size, eps = config.hidden_size, config.norm_eps
        self.input_norm = RMSNorm(builder, name=f"{name}.input_layernorm", size=size, eps=eps)
        self.expert_norm = RMSNorm(builder, name=f"{name}.post_attention_layernorm", size=size, eps=eps)
        self.mixer, self.experts = mixer, experts
        part = "full_attn" if kind == ATTENTION else "linear_attn"
        self.of_mixer = self._factors(config, part)
        self.of_experts = self._factors(config, "mlp")

    @staticmethod
    def _factors(config: ModelConfig, part: str) -> tuple[float, float]:
        """Of a block's input, and of its output."""
        return float(config.get(f"{part}_alpha_factor", 1)), float(config.get(f"{part}_beta_factor", 1))

    @property
    def backends(self) -> Sequence[CacheBackend]:
        return self.mixer.backends

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        x = self.input_norm(hidden if residual is None else hidden + residual)
        kept, added = self.of_mixer
        x = self.expert_norm(x * kept + self.mixer(x, context) * added)
        kept, added = self.of_experts
        return self.experts(x, context) * added, x * kept
