"""Zamba2: Mamba-2 layers, some of which read what one of a few shared transformer blocks makes of their input and of
the embeddings (config.json: Zamba2ForCausalLM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.mamba2 import Mamba2, Mamba2Sizes
from anychip.layers.norm import RMSNorm
from anychip.layers.rotary import make_rope
from anychip.layers.shared_block import SharedBlock, SharedBlockUse
from anychip.model_config import ModelConfig, rope_parameters
from anychip.models.decoder import full_attention
from anychip.models.hybrid import STATE, Hybrid, known_kinds
from anychip.plugin_api import AttentionSpec, CacheBackend, CacheSpec, ForwardContext, MeshShape, Rope
from anychip.types import DType

HYBRID = "hybrid"


class ZambaLayer:
    """A Mamba-2 mixer. Where the layer has `shared`, it reads the sum of the layer's input and what that makes of it;
    the residual sum has the input alone."""

    def __init__(self, norm: RMSNorm, mamba: Mamba2, shared: SharedBlockUse | None) -> None:
        self.norm, self.mamba, self.shared = norm, mamba, shared

    @property
    def backends(self) -> list[CacheBackend]:
        return [*self.mamba.backends, *(() if self.shared is None else self.shared.attention.backends)]

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, context: ForwardContext, embedded: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.shared is None:
            normed, residual = self.norm.with_residual(hidden, residual, self.mamba.accepts)
            return self.mamba(normed, context), residual
        total = hidden if residual is None else hidden + residual
        return self.mamba(self.norm(total + self.shared(total, embedded, context)), context), total


class Zamba2(Hybrid):
    renamed = MappingProxyType({"model.final_layernorm.": "model.norm."})

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> None:
        reasons = []
        if config.get("hidden_act") != "gelu":
            reasons.append(f"hidden_act {config.get('hidden_act')!r}; known is gelu")
        if config.get("use_long_context"):
            reasons.append("use_long_context, whose rotary embedding is not known")
        if builder.stage.count > 1:
            reasons.append("pipeline stages: every shared block reads the embeddings, which the first stage holds")
        if reasons:
            raise Unsupported(config.architecture, reasons)
        self.blocks: list[SharedBlock] = []
        super().__init__(config, builder, specs)

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        return known_kinds(config, "layers_block_type", {HYBRID: HYBRID})

    @classmethod
    def head_dim(cls, config: ModelConfig) -> int:
        """Of attention, whose input is twice as wide as the model."""
        return 2 * config.hidden_size // config.num_heads

    @classmethod
    def specs_of(
        cls, kind: str, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> Sequence[CacheSpec]:
        states = cls.state_specs(config, shape, dtype)
        if kind == STATE:
            return states
        spec = replace(full_attention(config, shape, dtype), kv_dtype=kv_dtype, head_dim=cls.head_dim(config))
        return [*states, spec]

    @classmethod
    def sizes(cls, config: ModelConfig) -> Mamba2Sizes:
        heads = int(config.need("n_mamba_heads"))
        return Mamba2Sizes(
            heads=heads,
            head_dim=int(config.need("mamba_expand") * config.hidden_size) // heads,
            state_dim=int(config.need("mamba_d_state")),
            groups=int(config.need("mamba_ngroups")),
            width=int(config.need("mamba_d_conv")),
        )

    def rope(self, builder: Builder) -> Rope | None:
        if not self.config.get("use_mem_rope"):
            return None
        device, dim = builder.platform.default_device, self.head_dim(self.config)
        return make_rope(self.config, rope_parameters(self.config), device, head_dim=dim)

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> ZambaLayer:
        config, name = self.config, f"model.layers.{index}"
        inner = f"{name}.mamba_decoder" if kind == HYBRID else name
        mamba = Mamba2(
            builder,
            name=f"{inner}.mamba",
            index=at,
            specs=specs[at : at + 2],
            sizes=self.sizes(config),
            hidden_size=config.hidden_size,
            norm_eps=1e-5,  # whatever rms_norm_eps is
            bias=bool(config.get("add_bias_linear", False)),
            dt_limits=(float(config.need("time_step_min")), math.inf),
        )
        norm = RMSNorm(builder, name=f"{inner}.input_layernorm", size=config.hidden_size, eps=config.norm_eps)
        shared = self.shared_block(builder, index, specs[at + 2], at + 2, rope) if kind == HYBRID else None
        return ZambaLayer(norm, mamba, shared)

    def shared_block(
        self, builder: Builder, index: int, spec: AttentionSpec, at: int, rope: Rope | None
    ) -> SharedBlockUse:
        """Uses take turns among the blocks, whose weights stand in the first layers that use them. A layer that has
        weights of its own in the checkpoint uses those."""
        config, name = self.config, f"model.layers.{index}.shared_transformer"
        place, count = self.kinds(config)[:index].count(HYBRID), int(config.need("num_mem_blocks"))
        if place >= count and not builder.stored.has(f"{name}.input_layernorm.weight"):
            block = self.blocks[place % count]
        else:
            attention = self.self_attention(
                builder,
                index,
                spec,
                rope,
                at=at,
                name=f"{name}.self_attn",
                scale=(spec.head_dim / 2) ** -0.5,
                input_size=2 * config.hidden_size,
            )
            block = SharedBlock(
                builder,
                name=name,
                attention=attention,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                eps=config.norm_eps,
                bias=bool(config.get("add_bias_linear", False)),
            )
            self.blocks.append(block)
            lists = ("self_attn.linear_", "feed_forward.gate_up_proj_adapter_list.")
            builder.weights.elsewhere += tuple(f"{name}.{each}" for each in lists)  # of uses that another block serves
        return SharedBlockUse(
            builder,
            block,
            linear=f"model.layers.{index}.linear",
            place=place,
            index=at,
            spec=spec,
            rank=int(config.need("adapter_rank")),
            adapts=bool(config.get("use_shared_attention_adapter", False)),
        )

    def layers_over(self, hidden: Tensor) -> Sequence[Any]:
        """Every shared block reads the embeddings, which are the first layer's input."""
        return [partial(layer, embedded=hidden) for layer in self.layers]
