"""Qwen3.5's text decoder, dense and as a mixture of experts: Qwen3-Next with gated delta nets whose matrices stand
apart (config.json: Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM)."""

from __future__ import annotations

from anychip.layers.build import Builder
from anychip.layers.gated_delta_net import GatedDeltaNet
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.models.qwen3_next import Qwen3Next


class Qwen35MoE(Qwen3Next):
    delta_net = GatedDeltaNet


class Qwen35(Qwen35MoE):
    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        return self.gated_mlp(builder, index)
