"""What a matrix can be made into: the scheme, and compressed-tensors' words for it.

The format's settings: https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from anychip.errors import ConfigError
from anychip.plugin_api import NAMED, QuantScheme
from anychip.quantization.format import GROUP_SIZES


@dataclass(frozen=True, slots=True)
class Target:
    """`weights` and `inputs` are config.json's words for the scheme's two sides; `container` is the format's."""

    scheme: QuantScheme
    container: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = field(default=None)

    def fits(self, columns: int) -> bool:
        """Whether a matrix of so many columns can be stored so."""
        size = self.scheme.group_size
        return columns % (size or 1) == 0 and columns % (32 // self.scheme.bits) == 0

    def grouped(self, columns: Iterable[int]) -> Target:
        """With the group size that fits most of the matrices of so many columns, and of such the largest."""
        if self.scheme.group_size is None:
            return self
        counts = Counter(columns)
        fitting = [(sum(n for width, n in counts.items() if width % size == 0), size) for size in GROUP_SIZES]
        size = max(fitting)[1]
        return replace(self, scheme=replace(self.scheme, group_size=size), weights={**self.weights, "group_size": size})

    def config(self, ignored: list[str]) -> dict[str, Any]:
        """quantization_config; `ignored` modules stay plain."""
        group = {
            "targets": ["Linear"],
            "weights": dict(self.weights),
            "input_activations": None if self.inputs is None else dict(self.inputs),
            "output_activations": None,
            "format": self.container,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.container,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
        }


def _side(kind: str, bits: int, strategy: str, **more: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {"type": kind, "num_bits": bits, "symmetric": True, "strategy": strategy, "dynamic": False, **more}
    )


_INT4 = _side("int", 4, "group", group_size=128, actorder="static")
_INT8 = _side("int", 8, "channel")
_FP8 = _side("float", 8, "channel")
TARGETS: Mapping[str, Target] = {
    "int4": Target(NAMED["int4"], "pack-quantized", _INT4),
    "int8": Target(NAMED["int8"], "pack-quantized", _INT8),
    "int8-w8a8": Target(NAMED["int8-w8a8"], "int-quantized", _INT8, _side("int", 8, "token", dynamic=True)),
    "fp8": Target(NAMED["fp8"], "float-quantized", _FP8, _side("float", 8, "token", dynamic=True)),
    "fp8-w8a16": Target(NAMED["fp8-w8a16"], "float-quantized", _FP8),
}
"""By the names that the schemes have everywhere."""


KV_SCHEMES: Mapping[str, Mapping[str, Any]] = {"fp8": _side("float", 8, "tensor"), "int8": _side("int", 8, "attn_head")}
"""kv_cache_scheme, by --kv-cache-dtype."""


def target(name: str) -> Target:
    """Raises ConfigError for a scheme that is not made here."""
    if name not in TARGETS:
        raise ConfigError(f"--scheme {name} is not one that this command makes; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
