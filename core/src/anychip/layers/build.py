"""What layers are built with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from anychip.errors import ConfigError
from anychip.layers.context_parallel import attention_backend
from anychip.layers.stage import WHOLE, Stage
from anychip.plugin_api import (
    KV_HEADS,
    AdapterSite,
    AttentionBackend,
    AttentionSpec,
    Mesh,
    Ops,
    Placed,
    Platform,
    QuantScheme,
    Sharded,
    Span,
    held,
)
from anychip.quantization.format import WeightFormat
from anychip.types import DType
from anychip.weights.register import WeightRegister
from anychip.weights.stored import StoredTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """Handed down while a model is built."""

    platform: Platform
    ops: Ops
    mesh: Mesh
    dtype: DType
    weights: WeightRegister
    formats: WeightFormat
    stored: StoredTensors
    stage: Stage = WHOLE
    """Of the model's layers, those that this rank builds."""
    draws: bool = True
    """Whether tokens are drawn: a model that gives vectors alone has no output head."""
    kv_scales: bool = False
    """Whether the KV cache is quantized, so that layers want its scales."""
    adapter_targets: frozenset[str] = frozenset()
    """What requests' adapters may change, of config.ADAPTER_TARGETS: layers note where those go."""
    adapter_sites: list[AdapterSite] = field(default_factory=list)
    """Of the products built so far."""
    expert_layers: list[Any] = field(default_factory=list)
    """Mixtures of experts that were built so far: layers.moe.SparseMoE, or what stands for one."""
    moves_experts: bool = False
    """Whether experts may move between ranks, and tokens travel to them."""
    num_redundant_experts: int = 0
    """Slots of all ranks beyond one for each expert."""

    def takes(self, target: str) -> bool:
        """Whether adapters may change such layers."""
        return target in self.adapter_targets

    def add_site(self, **fields: Any) -> AdapterSite:
        """One more product that takes adapters; `fields` of AdapterSite."""
        site = AdapterSite(index=len(self.adapter_sites), **fields)
        self.adapter_sites.append(site)
        return site

    def scheme(self, modules: Sequence[str], in_features: int) -> QuantScheme | None:
        """The one scheme of modules that are packed into one product."""
        schemes = {module: self.formats.scheme(module, in_features) for module in modules}
        first = schemes[modules[0]]
        for module, scheme in schemes.items():
            if scheme != first:
                raise ConfigError(
                    f"{modules[0]} is stored as {_name(first)} and {module} as {_name(scheme)}: they are one product "
                    "here and need one scheme"
                )
        return first

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """What serves a layer's attention, over this rank's share of a sequence's keys."""
        return attention_backend(self.platform, spec, self.mesh)

    def held(self, extents: Sequence[int], placed: Placed, what: str) -> tuple[Span, ...]:
        """What this rank holds of a tensor, by dimension."""
        return held(extents, placed, self.mesh, what)

    def split(self, total: int, what: str) -> Span:
        """This rank's equal share of `total` along tp."""
        return self.held((total,), (Sharded(dim=0),), what)[0]

    def expert_features(self, total: int) -> int:
        """How many of an expert's intermediate features this rank holds."""
        return total if self.mesh.shape.covers("ep", "tp") else self.split(total, "expert features").count

    def kv_heads(self, spec: AttentionSpec, num_kv_heads: int) -> Span:
        """This rank's KV heads, as the pages are placed."""
        return self.held((2, 1, num_kv_heads, spec.head_dim), spec.pages, "key-value heads")[KV_HEADS]


def _name(scheme: QuantScheme | None) -> str:
    return "plain values" if scheme is None else f"{scheme.name} by {scheme.scales}"
