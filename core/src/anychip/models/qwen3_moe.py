"""Qwen3-MoE: Qwen3 with a mixture of experts in its sparse layers (config.json: Qwen3MoeForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.model_config import ModelConfig
from anychip.models.qwen2_moe import experts, is_sparse
from anychip.models.qwen3 import Qwen3


class Qwen3MoE(Qwen3):
    @classmethod
    def layer_types(cls, config: ModelConfig) -> list[str]:
        """One kind for every layer."""
        kind = "sliding_attention" if config.get("use_sliding_window") else "full_attention"
        return [kind] * config.num_layers

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        if is_sparse(self.config, index):
            config = self.config
            count = int(config.get("num_local_experts") or config.need("num_experts"))  # since transformers 5
            return experts(self, builder, index, count)
        return super().feed_forward(builder, index)
