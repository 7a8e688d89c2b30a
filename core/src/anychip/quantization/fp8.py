"""FP8 containers: float8_e4m3fn weights with one scale, or one for each block of 128 x 128.

Tensors of a module: weight [out_features, in_features]; weight_scale [] or [1], or weight_scale_inv [row blocks,
column blocks], which despite its name multiplies; input_scale [] or [1] where activations are static.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anychip.errors import Unsupported
from anychip.plugin_api import QuantScheme
from anychip.quantization.format import Container
from anychip.quantization.stored import want_input_scale, want_scales, want_values
from anychip.weights.matrix import Matrix
from anychip.weights.register import WeightRegister


class FP8(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        block = config.get("weight_block_size")
        static = config.get("activation_scheme", "dynamic") == "static"
        if block and (len(set(block)) != 1 or static):
            raise Unsupported("FP8 checkpoint", [f"blocks of {block} with {config.get('activation_scheme')} scales"])
        if block:
            self._scheme = QuantScheme(values="fp8_e4m3", scales="block", group_size=int(block[0]), activations="group")
        else:
            self._scheme = QuantScheme(values="fp8_e4m3", scales="tensor", activations="static" if static else "token")
        self.scale_name = "weight_scale_inv" if block else "weight_scale"
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        return self._scheme if f"{module}.{self.scale_name}" in self.names else None

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        want_values(register, matrix, "float8_e4m3fn")
        want_scales(register, matrix, scheme, f"{matrix.name}.{self.scale_name}")
        want_input_scale(register, matrix, scheme)
