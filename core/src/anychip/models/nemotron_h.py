"""Nemotron-H: every layer is one block: a Mamba-2 mixer, attention without positions, a feed-forward block, or experts
without gates beside a shared one (config.json: NemotronHForCausalLM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.mamba2 import Mamba2, Mamba2Sizes
from anychip.layers.moe import SparseMoE
from anychip.layers.plain_mlp import PlainMLP, squared_relu
from anychip.model_config import ModelConfig
from anychip.models.deepseek import corrected_routing, num_experts
from anychip.models.hybrid import ATTENTION, STATE, BlockLayer, Hybrid, known_kinds, need_silu
from anychip.plugin_api import Rope

FEED_FORWARD, EXPERTS = "mlp", "moe"
_PATTERN = {"M": STATE, "*": ATTENTION, "-": FEED_FORWARD, "E": EXPERTS}
"""hybrid_override_pattern's letters."""


class NemotronH(Hybrid):
    rotates = False
    renamed = MappingProxyType(
        {"backbone.": "model.", "model.embeddings.": "model.embed_tokens.", "model.norm_f.": "model.norm."}
    )

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> None:
        builder.weights.elsewhere += ("mtp.",)  # layers that predict further tokens
        super().__init__(config, builder, specs)

    @classmethod
    def wanted_name(cls, name: str) -> str:
        for theirs, ours in cls.renamed.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        return name

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        for field in ("layer_types", "layers_block_type"):
            if config.get(field) is not None:
                return known_kinds(config, field, {FEED_FORWARD: FEED_FORWARD, EXPERTS: EXPERTS})
        letters = config.need("hybrid_override_pattern")[: config.num_layers]
        if unknown := sorted({*letters} - _PATTERN.keys()):
            reason = f"hybrid_override_pattern has {', '.join(unknown)}; known are M, *, - and E"
            raise Unsupported(config.architecture, [reason])
        return [_PATTERN[letter] for letter in letters]

    @classmethod
    def sizes(cls, config: ModelConfig) -> Mamba2Sizes:
        return Mamba2Sizes(
            heads=int(config.need("mamba_num_heads")),
            head_dim=int(config.need("mamba_head_dim")),
            state_dim=int(config.need("ssm_state_size")),
            groups=int(config.need("n_groups")),
            width=int(config.need("conv_kernel")),
        )

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> BlockLayer:
        config, name = self.config, f"model.layers.{index}"
        if kind == FEED_FORWARD:
            block = self.feed_forward(builder, f"{name}.mixer", config.intermediate_size)
            return BlockLayer(builder, config, name, blocks={"norm": block})
        if kind == EXPERTS:
            return BlockLayer(builder, config, name, blocks={"norm": self.experts(builder, f"{name}.mixer")})
        if kind == ATTENTION:
            attention = self.self_attention(builder, index, specs[at], None, at=at, name=f"{name}.mixer")
            return BlockLayer(builder, config, name, mixer=("norm", attention))
        need_silu(config, "mamba_hidden_act")
        mamba = Mamba2(
            builder,
            name=f"{name}.mixer",
            index=at,
            specs=specs[at : at + 2],
            sizes=self.sizes(config),
            hidden_size=config.hidden_size,
            norm_eps=config.norm_eps,
            bias=bool(config.get("use_bias", False)),
            conv_bias=bool(config.get("use_conv_bias")),
            dt_limits=(float(config.need("time_step_min")), math.inf),
        )
        return BlockLayer(builder, config, name, mixer=("norm", mamba))

    def feed_forward(self, builder: Builder, name: str, size: int) -> PlainMLP:
        config = self.config
        if (activation := config.get("mlp_hidden_act", "relu2")) != "relu2":
            raise Unsupported(config.architecture, [f"mlp_hidden_act {activation!r}; known is relu2"])
        bias = bool(config.get("mlp_bias", False))
        return PlainMLP(
            builder,
            name=name,
            hidden_size=config.hidden_size,
            intermediate_size=size,
            activation=squared_relu,
            bias=bias,
        )

    def experts(self, builder: Builder, name: str) -> SparseMoE:
        config, size = self.config, int(self.config.need("moe_intermediate_size"))
        if (latent := config.get("moe_latent_size")) is not None:
            raise Unsupported(
                config.architecture, [f"moe_latent_size {latent}; experts read hidden states as they are"]
            )
        shared_size = int(config.need("moe_shared_expert_intermediate_size"))
        shared = self.feed_forward(builder, f"{name}.shared_experts", shared_size)
        spec = self.experts_spec(
            builder,
            num_experts=num_experts(config),
            top_k=int(config.need("num_experts_per_tok")),
            intermediate_size=size,
            activation="relu2",
            router_scale=float(config.get("routed_scaling_factor", 1.0)),
            **corrected_routing(config),
        )
        return SparseMoE(
            builder,
            name=name,
            spec=spec,
            intermediate_size=size,
            names=("", "up_proj", "down_proj"),
            correction="gate.e_score_correction_bias",
            shared=shared,
        )
