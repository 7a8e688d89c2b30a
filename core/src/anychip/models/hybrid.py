"""The frame of decoders whose layers differ in what they keep: states, keys and values, both, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.norm import RMSNorm
from anychip.model_config import ModelConfig
from anychip.models.decoder import Decoder, full_attention
from anychip.plugin_api import (
    ActFormat,
    CacheBackend,
    CacheSpec,
    ForwardContext,
    MeshShape,
    Rope,
    StateSpec,
)
from anychip.types import DType

ATTENTION, STATE = "full_attention", "linear_attention"
"""Kinds of layers, by transformers' names."""


class Mixer(Protocol):
    """Mixes tokens of a sequence, and keeps something of them."""

    @property
    def backends(self) -> Sequence[CacheBackend]:
        """What keeps it, in the order of the layer's specs."""
        ...

    @property
    def accepts(self) -> ActFormat: ...

    def __call__(self, x: Tensor, context: ForwardContext, /) -> Tensor: ...


class FeedForward(Protocol):
    """Changes every token by itself."""

    @property
    def accepts(self) -> ActFormat: ...

    def __call__(self, x: Tensor, context: ForwardContext | None, /) -> Tensor: ...


class StateSizes(Protocol):
    """Sizes of a mixer that keeps states."""

    def specs(self, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        """What it keeps on one rank."""
        ...


class KeepingLayer(Protocol):
    """A layer, and what keeps something in it."""

    @property
    def backends(self) -> Sequence[CacheBackend]:
        """In the order of the layer's specs."""
        ...


class BlockLayer:
    """A mixer or none, then feed-forward blocks, each behind a norm of its own and within a residual sum. What a block
    adds is multiplied by `multiplier`. Norms are given by the name that the checkpoint has for them in this layer."""

    def __init__(
        self,
        builder: Builder,
        config: ModelConfig,
        name: str,
        *,
        mixer: tuple[str, Mixer] | None = None,
        blocks: Mapping[str, FeedForward] | None = None,
        unit_offset: bool = False,
        multiplier: float = 1.0,
    ) -> None:
        def norm(part: str) -> RMSNorm:
            size, eps = config.hidden_size, config.norm_eps
            return RMSNorm(builder, name=f"{name}.{part}", size=size, eps=eps, unit_offset=unit_offset)

        self.mixer = None if mixer is None else (norm(mixer[0]), mixer[1])
        self.blocks = [(norm(part), block) for part, block in (blocks or {}).items()]
        self.multiplier = multiplier

    @property
    def backends(self) -> Sequence[CacheBackend]:
        return () if self.mixer is None else self.mixer[1].backends

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        if self.mixer is not None:
            norm, mixer = self.mixer
            normed, residual = norm.with_residual(hidden, residual, mixer.accepts)
            hidden = self._scaled(mixer(normed, context))
        for norm, block in self.blocks:
            normed, residual = norm.with_residual(hidden, residual, block.accepts)
            hidden = self._scaled(block(normed, context))
        assert residual is not None, "a layer has a block"
        return hidden, residual

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.multiplier == 1.0 else hidden * self.multiplier


class Hybrid(Decoder):
    """A family overrides `kinds`, `sizes` and `hybrid_layer`, and `specs_of` where a kind keeps something else.
    `prefix` begins the names of a checkpoint whose decoder is not called model., and `renamed` has its other names."""

    prefix = "model."
    renamed: Mapping[str, str] = MappingProxyType({})
    rotates = True
    """Whether positions turn queries and keys. Where not, the order of tokens is in the states alone."""

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> None:
        if self.prefix != "model." or self.renamed:
            builder.weights.rename = self.wanted_name
        super().__init__(config, builder, specs)

    @classmethod
    def wanted_name(cls, name: str) -> str:
        name = f"model.{name.removeprefix(cls.prefix)}" if name.startswith(cls.prefix) else name
        for theirs, ours in cls.renamed.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    # -- what layers keep ---------------------------------------------------------------------------------

    @classmethod
    def kinds(cls, config: ModelConfig) -> list[str]:
        """By layer."""
        return known_kinds(config, "layer_types")

    @classmethod
    def sizes(cls, config: ModelConfig) -> StateSizes:
        """Of a layer of the kind STATE."""
        raise TypeError(f"{cls.__name__} does not say what its states are")

    @classmethod
    def state_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType) -> list[StateSpec]:
        """What a layer of the kind STATE keeps on one rank."""
        return cls.sizes(config).specs(shape, dtype)

    @classmethod
    def specs_of(
        cls, kind: str, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> Sequence[CacheSpec]:
        if kind == ATTENTION:
            return [replace(full_attention(config, shape, dtype), kv_dtype=kv_dtype)]
        return cls.state_specs(config, shape, dtype) if kind == STATE else []

    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> Any:
        """Those of the first layer, then those of the second, and so on."""
        return [spec for kind in cls.kinds(config) for spec in cls.specs_of(kind, config, shape, dtype, kv_dtype)]

    @classmethod
    def caches_by_layer(cls, config: ModelConfig) -> list[int]:
        # Neither the mesh nor the dtypes change how many there are.
        return [len(cls.specs_of(kind, config, MeshShape(), "float32", "float32")) for kind in cls.kinds(config)]

    def rope(self, builder: Builder) -> Rope | None:
        return super().rope(builder) if self.rotates else None

    # -- layers -------------------------------------------------------------------------------------------

    def build_layers(self, builder: Builder, specs: Sequence[CacheSpec], rope: Rope | None) -> list[Any]:
        layers, at = list[KeepingLayer](), 0
        kinds = self.kinds(self.config)
        for index in self.held_layers:
            layer = self.hybrid_layer(builder, index, kinds[index], specs, at, rope)
            layers.append(layer)
            at += len(layer.backends)
        assert at == len(specs), f"layers keep {at} caches, and {len(specs)} were planned"
        return layers

    def hybrid_layer(
        self, builder: Builder, index: int, kind: str, specs: Sequence[Any], at: int, rope: Rope | None
    ) -> KeepingLayer:
        """The layer's specs begin at `at`."""
        raise TypeError(f"{type(self).__name__} does not say what its layers are")

    @property
    def attention(self) -> list[Any]:
        return [backend for layer in self.layers for backend in layer.backends]


def need_silu(config: ModelConfig, field: str = "hidden_act") -> None:
    """Raises Unsupported where the activation behind state layers' convolutions is another one."""
    if (name := config.get(field, "silu")) not in ("silu", "swish"):
        raise Unsupported(config.architecture, [f"{field} {name!r} of state layers; known is silu"])


def known_kinds(config: ModelConfig, field: str, names: Mapping[str, str] | None = None) -> list[str]:
    """config.json's kinds of layers; `names` are other words for them. Raises Unsupported for an unknown kind."""
    names = {ATTENTION: ATTENTION, STATE: STATE, "attention": ATTENTION, "mamba": STATE, **(names or {})}
    given = config.need(field)[: config.num_layers]
    if unknown := sorted({*given} - names.keys()):
        raise Unsupported(config.architecture, [f"{field} {', '.join(unknown)}; known are {', '.join(sorted(names))}"])
    return [names[kind] for kind in given]
