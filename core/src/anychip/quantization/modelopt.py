"""NVIDIA Model Optimizer's containers: FP8 with one scale, MXFP8, and NVFP4.

Tensors of a module. FP8: weight float8_e4m3fn [out_features, in_features], weight_scale [], input_scale []. MXFP8: the
same weight, weight_scale uint8 [out_features, groups], exponents. NVFP4: weight uint8 [out_features, in_features / 2],
weight_scale [out_features, groups], weight_scale_2 [], which multiplies, and input_scale [] of activations, which stay
as they are here. A cache's scales stand beside the projections: k_proj.k_scale, v_proj.v_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anychip.errors import Unsupported
from anychip.plugin_api import QuantScheme
from anychip.quantization.format import Container
from anychip.quantization.group_floats import grouped_floats, want_exponents, want_pairs, want_two_scales
from anychip.quantization.stored import cache_scale_beside, want_input_scale, want_nothing, want_scales, want_values
from anychip.weights.matrix import Matrix
from anychip.weights.register import WeightRegister

_FP8 = QuantScheme(values="fp8_e4m3", scales="tensor", activations="static")
_ALGORITHMS = {"FP8": None, "MXFP8": 32, "NVFP4": 16}
"""With the size of their groups, unless the checkpoint says another."""


class ModelOpt(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        self.algorithm = str(config.get("quant_algo"))
        if self.algorithm not in _ALGORITHMS:
            raise Unsupported(
                "modelopt checkpoint", [f"quant_algo {self.algorithm}; {', '.join(_ALGORITHMS)} are read"]
            )
        groups = list((config.get("config_groups") or {}).values())
        given = groups[0]["weights"].get("group_size") if groups else config.get("group_size")
        self.group_size = given or _ALGORITHMS[self.algorithm]
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.weight_scale" not in self.names and f"{module}.weight_scale_2" not in self.names:
            return None
        if self.algorithm == "FP8":
            return _FP8
        return grouped_floats(self.algorithm.lower(), module, in_features, int(self.group_size or 0))

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        name = matrix.name
        if self.algorithm == "NVFP4":
            want_pairs(register, matrix, f"{name}.weight")
            want_two_scales(register, matrix, scheme, f"{name}.weight_scale", f"{name}.weight_scale_2", divides=False)
        else:
            want_values(register, matrix, "float8_e4m3fn")
            if self.algorithm == "MXFP8":
                want_exponents(register, matrix, scheme, f"{name}.weight_scale")
            else:
                want_scales(register, matrix, scheme, f"{name}.weight_scale")
                want_input_scale(register, matrix, scheme)
        if self.algorithm != "FP8":
            want_nothing(register, f"{name}.input_scale")
        cache_scale_beside(register, name, lambda letter: f"{letter}_scale")
