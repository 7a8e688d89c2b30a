"""AMD Quark's container: FP8, int8, MXFP4 and MXFP8.

Tensors of a module: weight [out_features, in_features] in float8_e4m3fn or int8, of MXFP4 uint8 [out_features,
in_features / 2]; weight_scale [], [out_features] or exponents uint8 [out_features, groups]; input_scale. A cache's
scales stand beside the projections: k_proj.output_scale, v_proj.output_scale. Activations that the checkpoint rounds to
MX formats stay as they are. https://quark.docs.amd.com
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from anychip.errors import Unsupported
from anychip.plugin_api import VALUES, QuantScheme
from anychip.quantization.format import Container
from anychip.quantization.group_floats import grouped_floats, want_exponents, want_pairs
from anychip.quantization.stored import cache_scale_beside, want_input_scale, want_nothing, want_scales, want_values
from anychip.weights.matrix import Matrix
from anychip.weights.register import WeightRegister

_MX = {"fp4": "mxfp4", "fp8_e4m3": "mxfp8"}
_BY = {"per_tensor": "tensor", "per_channel": "channel"}
_READ = "fp8_e4m3 and int8 by tensor or channel, and fp4 and fp8_e4m3 by group with e8m0 scales are read"


class Quark(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        self._all: Mapping[str, Any] = config["global_quant_config"]
        self._named: Mapping[str, Mapping[str, Any]] = config.get("layer_quant_config") or {}
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.weight_scale" not in self.names:
            return None
        settings = next((given for name, given in self._named.items() if fnmatchcase(module, name)), self._all)
        return _scheme(module, in_features, settings["weight"], settings.get("input_tensors"))

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        name = matrix.name
        scales = f"{name}.weight_scale"
        if scheme.values == "fp4_e2m1":
            want_pairs(register, matrix, f"{name}.weight")
        else:
            want_values(register, matrix, VALUES[scheme.values].dtype)
        if scheme.scale_format == "e8m0":
            want_exponents(register, matrix, scheme, scales)
        else:
            want_scales(register, matrix, scheme, scales)
        want_input_scale(register, matrix, scheme)
        # Zeros of symmetric values, which are 0, and what is known of activations that are not rounded.
        unused = ["weight_zero_point", "input_zero_point"]
        want_nothing(register, *(f"{name}.{each}" for each in unused))
        if scheme.activations != "static":
            want_nothing(register, f"{name}.input_scale")
        cache_scale_beside(register, name, lambda letter: "output_scale")


def _scheme(module: str, in_features: int, weight: Any, inputs: Any) -> QuantScheme:
    refused = Unsupported("Quark checkpoint", [f"{module}: weight {weight} with input_tensors {inputs}; {_READ}"])
    if not isinstance(weight, Mapping) or not isinstance(inputs, Mapping | None):
        raise refused  # a list: one format upon another
    dtype, by, symmetric = weight.get("dtype"), weight.get("qscheme"), weight.get("symmetric") is not False
    if by == "per_group" and weight.get("scale_format") == "e8m0" and dtype in _MX:
        return grouped_floats(_MX[dtype], module, in_features, int(weight.get("group_size") or 0))
    if dtype not in ("fp8_e4m3", "int8") or by not in _BY or not symmetric:
        raise refused
    scales: Any = _BY[by]
    if inputs is None:
        return QuantScheme(values=dtype, scales=scales)
    if inputs.get("dtype") != dtype:
        raise refused
    if inputs.get("is_dynamic"):
        return QuantScheme(values=dtype, scales=scales, activations="token")
    if dtype == "int8" or inputs.get("qscheme") != "per_tensor":
        raise refused
    return QuantScheme(values=dtype, scales=scales, activations="static")
