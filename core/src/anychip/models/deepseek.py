"""DeepSeek V2 and V3: latent attention; experts that are picked within the best groups, beside experts that every token
goes through (config.json: DeepseekV2ForCausalLM, DeepseekV3ForCausalLM).

R1 and Kimi K2 have V3's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.indexer import Indexer
from anychip.layers.latent import LatentAttention
from anychip.layers.mlp import GatedMLP
from anychip.layers.moe import SparseMoE
from anychip.layers.rotary import make_rope, yarn_scale
from anychip.model_config import ModelConfig, rope_parameters
from anychip.models.decoder import Decoder, PreNormLayer
from anychip.plugin_api import CacheSpec, LatentSpec, MeshShape, Rope, Sharded
from anychip.types import DType

_ALIASES = {"DeepseekV2ForCausalLM": "num_experts"}
"""What transformers' class takes before n_routed_experts; of other classes it is num_local_experts."""
LATENT_EPS = 1e-6
"""Of the latents' norms, whatever rms_norm_eps is."""


class DeepseekV2(Decoder):
    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[CacheSpec]) -> None:
        builder.stored.leave_out_layers(config.num_layers)
        super().__init__(config, builder, specs)

    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> list[LatentSpec]:
        return [latent_spec(config, shape, dtype, kv_dtype)] * config.num_layers

    @property
    def interleaved(self) -> bool:
        """Whether rotated pairs are neighbours."""
        return True

    @property
    def mlp_bias(self) -> bool:
        return bool(self.config.get("mlp_bias", False))

    def rope(self, builder: Builder) -> Rope:
        return make_rope(
            self.config,
            rope_parameters(self.config),
            builder.platform.default_device,
            head_dim=int(self.config.need("qk_rope_head_dim")),
            interleaved=self.interleaved,
        )

    def layer(self, builder: Builder, index: int, spec: LatentSpec, rope: Rope) -> PreNormLayer:
        config = self.config
        attention = LatentAttention(
            builder,
            name=f"model.layers.{index}.self_attn",
            index=self.place(index),
            spec=spec,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            scale=(spec.nope_dim + spec.rope_dim) ** -0.5 * yarn_scale(rope_parameters(config)),
            rope=rope,
            query_rank=config.get("q_lora_rank"),
            norm_eps=LATENT_EPS,
            bias=bool(config.get("attention_bias", False)),
            indexer=self.indexer(builder, index, rope),
        )
        return PreNormLayer(builder, config, index, attention, self.feed_forward(builder, index))

    def indexer(self, builder: Builder, index: int, rope: Rope) -> Indexer | None:
        """What chooses the tokens that a layer attends to; None: it attends to all."""
        return None

    def feed_forward(self, builder: Builder, index: int) -> GatedMLP | SparseMoE:
        if is_dense(self.config, index):
            return self.gated_mlp(builder, index, bias=self.mlp_bias)
        return experts(self, builder, index, bias=self.mlp_bias, **self.routing())

    def routing(self) -> dict[str, Any]:
        """How experts are picked and weighted, in MoESpec's fields."""
        config, method = self.config, self.config.get("topk_method", "greedy")
        if config.get("norm_topk_prob"):
            raise Unsupported(config.architecture, ["norm_topk_prob; weights are used as the softmax gives them"])
        if method == "greedy":
            return {"renormalize": False}
        if method != "group_limited_greedy":
            reason = f"topk_method {method!r}; known are greedy and group_limited_greedy"
            raise Unsupported(config.architecture, [reason])
        groups, count, wanted = groups_of(config), num_experts(config), int(config.need("num_experts_per_tok"))
        held = count // groups["num_groups"] * groups["top_groups"]
        if wanted > held:
            reason = (
                f"num_experts_per_tok {wanted}, and {groups['top_groups']} of {groups['num_groups']} groups of {count}"
            )
            raise Unsupported(config.architecture, [f"{reason} experts hold {held}"])
        return {"renormalize": False, **groups}


class DeepseekV3(DeepseekV2):
    @property
    def interleaved(self) -> bool:
        return bool(self.config.get("rope_interleave", True))

    @property
    def mlp_bias(self) -> bool:
        return False

    def routing(self) -> dict[str, Any]:
        return corrected_routing(self.config)


def latent_spec(config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> LatentSpec:
    """Of one rank of a mesh."""
    return LatentSpec(
        num_heads=Sharded(dim=0).count(config.num_heads, shape, "attention heads"),
        latent_dim=int(config.need("kv_lora_rank")),
        rope_dim=int(config.need("qk_rope_head_dim")),
        nope_dim=int(config.need("qk_nope_head_dim")),
        v_dim=int(config.need("v_head_dim")),
        dtype=dtype,
        kv_dtype=kv_dtype,
    )


def corrected_routing(config: ModelConfig) -> dict[str, Any]:
    """By sigmoid, with a correction that keeps experts evenly loaded (Wang et al., "Auxiliary-Loss-Free Load
    Balancing", 2024)."""
    return {
        "scoring": "sigmoid",
        "router_bias": True,
        "renormalize": bool(config.get("norm_topk_prob", True)),
        **groups_of(config),
    }


def is_dense(config: ModelConfig, index: int) -> bool:
    """Whether a layer has one feed-forward block and no experts: those that are listed so, or the first ones."""
    if kinds := config.get("mlp_layer_types"):
        return bool(kinds[index] == "dense")
    return index < int(config.get("first_k_dense_replace") or 0)


def num_experts(config: ModelConfig) -> int:
    """Those that are routed to."""
    return int(config.get(_ALIASES.get(config.architecture, "num_local_experts")) or config.need("n_routed_experts"))


def experts(family: Decoder, builder: Builder, index: int, *, bias: bool = False, **routing: Any) -> SparseMoE:
    """Experts beside shared ones. `routing`: how they are picked and weighted, in MoESpec's fields."""
    config = family.config
    if config.get("moe_layer_freq", 1) != 1:
        raise Unsupported(config.architecture, [f"moe_layer_freq {config.get('moe_layer_freq')}; 1 is known"])
    name, size = f"model.layers.{index}.mlp", int(config.need("moe_intermediate_size"))
    shared = GatedMLP(
        builder,
        name=f"{name}.shared_experts",
        hidden_size=config.hidden_size,
        intermediate_size=size * int(config.need("n_shared_experts")),
        activation=family.activation,
        bias=bias,
    )
    spec = family.experts_spec(
        builder,
        num_experts=num_experts(config),
        top_k=int(config.need("num_experts_per_tok")),
        intermediate_size=size,
        router_scale=float(config.get("routed_scaling_factor", 1.0)),
        **routing,
    )
    correction = "gate.e_score_correction_bias"
    return SparseMoE(builder, name=name, spec=spec, intermediate_size=size, correction=correction, shared=shared)


def groups_of(config: ModelConfig) -> dict[str, int]:
    """MoESpec's fields of config.json's groups of experts."""
    return {"num_groups": int(config.need("n_group")), "top_groups": int(config.need("topk_group"))}
