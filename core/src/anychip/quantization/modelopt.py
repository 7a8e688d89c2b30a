"""NVIDIA Model Optimizer's container of NVFP4: four-bit floats, an e4m3 scale for each 16, one float32 scale for all.

Tensors of a module: weight uint8 [out_features, in_features / 2], weight_scale [out_features, groups], weight_scale_2
[], which multiplies, and input_scale [] of activations, which stay as they are here. A cache's scales stand beside the
projections: k_proj.k_scale, v_proj.v_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anychip.errors import Unsupported
from anychip.plugin_api import QuantScheme
from anychip.quantization.format import Container
from anychip.quantization.fp4 import grouped_fp4, want_pairs, want_two_scales
from anychip.weights.matrix import Matrix
from anychip.weights.register import WeightRegister


class ModelOpt(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        algorithm = config.get("quant_algo")
        if algorithm != "NVFP4":
            raise Unsupported("modelopt checkpoint", [f"quant_algo {algorithm}; NVFP4 is read"])
        groups = list((config.get("config_groups") or {}).values())
        self.group_size = int(groups[0]["weights"]["group_size"] if groups else config.get("group_size", 16))
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.weight_scale" not in self.names and f"{module}.weight_scale_2" not in self.names:
            return None
        return grouped_fp4("nvfp4", module, in_features, self.group_size)

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        name = matrix.name
        want_pairs(register, matrix, f"{name}.weight")
        want_two_scales(register, matrix, scheme, f"{name}.weight_scale", f"{name}.weight_scale_2", divides=False)
        register.want(f"{name}.input_scale", None, lambda view: None)
        register.optional.add(f"{name}.input_scale")
        module, _, projection = name.rpartition(".")
        if projection in ("k_proj", "v_proj"):
            scale = f"{projection[0]}_scale"
            register.aliases[f"{name}.{scale}"] = f"{module}.{scale}"
