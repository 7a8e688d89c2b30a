"""What layers are built with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anychip.errors import ConfigError
from anychip.plugin_api import Ops, Platform, QuantScheme, Shard
from anychip.quantization.format import WeightFormat
from anychip.types import DType
from anychip.weights.matrix import Span
from anychip.weights.register import WeightRegister
from anychip.weights.stored import StoredTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """Handed down while a model is built."""

    platform: Platform
    ops: Ops
    shard: Shard
    dtype: DType
    weights: WeightRegister
    formats: WeightFormat
    stored: StoredTensors
    kv_scales: bool = False
    """Whether the KV cache is quantized, so that layers want its scales."""

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

    def split(self, total: int, what: str) -> Span:
        """This rank's equal share of `total`."""
        if total % self.shard.size:
            raise _uneven(total, self.shard.size, what)
        rows = total // self.shard.size
        return Span(self.shard.rank * rows, rows)

    def split_heads(self, num_kv_heads: int) -> Span:
        """This rank's KV heads; with more ranks than heads, neighbours hold the same head."""
        size, rank = self.shard.size, self.shard.rank
        if num_kv_heads >= size:
            return self.split(num_kv_heads, "key-value heads")
        if size % num_kv_heads:
            raise _uneven(size, num_kv_heads, "ranks over key-value heads")
        return Span(rank * num_kv_heads // size, 1)


def _name(scheme: QuantScheme | None) -> str:
    return "plain values" if scheme is None else f"{scheme.name} by {scheme.scales}"


def _uneven(total: int, size: int, what: str) -> ConfigError:
    return ConfigError(f"{total} {what} do not split evenly {size} ways; choose another tensor_parallel_size")
