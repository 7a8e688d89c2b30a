"""Qwen3-MoE: Qwen3 with a mixture of experts in its sparse layers (config.json: Qwen3MoeForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP, SparseMoE
from anychip.model_config import ModelConfig
from anychip.models.qwen3 import Qwen3
from anychip.plugin_api import MoESpec


class Qwen3MoE(Qwen3):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        """One kind for every layer."""
        kind = "sliding_attention" if config.get("use_sliding_window") else "full_attention"
        return [kind] * config.num_layers

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        config = self.config
        sparse_step = int(config.get("decoder_sparse_step", 1))
        if index in (config.get("mlp_only_layers") or []) or (index + 1) % sparse_step:
            return super().feed_forward(builder, index)
        intermediate_size = int(config.need("moe_intermediate_size"))
        spec = MoESpec(
            num_experts=int(config.get("num_local_experts") or config.need("num_experts")),  # since transformers 5
            top_k=int(config.need("num_experts_per_tok")),
            hidden_size=config.hidden_size,
            intermediate_size=builder.split(intermediate_size, "expert features").count,
            dtype=builder.dtype,
            activation=self.activation,
            renormalize=bool(config.get("norm_topk_prob", False)),
        )
        return SparseMoE(builder, name=f"model.layers.{index}.mlp", spec=spec, intermediate_size=intermediate_size)
