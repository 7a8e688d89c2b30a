"""compressed-tensors' containers: pack-quantized int4 and int8, int-quantized int8, float-quantized FP8, four-bit
floats of both kinds (mxfp4-pack-quantized, nvfp4-pack-quantized), and mxfp8-quantized.

The format's settings: https://github.com/vllm-project/compressed-tensors. Tensors of a module: weight, or
weight_packed int32 [out_features, words] with weight_shape; weight_scale; weight_zero_point; input_scale; weight_g_idx
int32 [in_features], each input's group, where columns are ordered by activation. Of MXFP8: weight_scale uint8
[out_features, groups], exponents. Of four-bit floats: weight_packed uint8 [out_features, in_features / 2],
weight_scale, and for NVFP4 weight_global_scale [1], which divides, and input_global_scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from anychip.errors import Unsupported
from anychip.plugin_api import VALUES, QuantScheme, WeightView
from anychip.quantization.format import Container, column_groups
from anychip.quantization.gptq import check_order, column_order, grouped_int, signed
from anychip.quantization.group_floats import grouped_floats, want_exponents, want_pairs, want_two_scales
from anychip.quantization.packing import unpack
from anychip.quantization.stored import want_input_scale, want_nothing, want_scales, want_together, want_values
from anychip.types import cdiv
from anychip.weights.matrix import Matrix, row_chunks
from anychip.weights.register import WeightRegister

_BY_GROUP = ("group", True)
"""`actorder` of columns whose groups are not neighbours; under "weight" and "static" they are."""


class CompressedTensors(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        self.groups = list(config.get("config_groups", {}).values())
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.weight_scale" not in self.names and f"{module}.weight_packed" not in self.names:
            return None
        group = self._group(module)
        return _scheme(module, in_features, group["weights"], group.get("input_activations"))

    def ordered(self, module: str) -> bool:
        if f"{module}.weight_g_idx" not in self.names:
            return False
        return self._group(module)["weights"].get("actorder") in _BY_GROUP

    def _group(self, module: str) -> Mapping[str, Any]:
        group: Mapping[str, Any] | None = next((group for group in self.groups if _targets(group, module)), None)
        if group is None:
            raise Unsupported("compressed-tensors checkpoint", [f"no config group names {module}"])
        return group

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        if scheme.values == "fp4_e2m1":
            _want_fp4(register, matrix, scheme)
            return
        if scheme.scale_format == "e8m0":
            want_values(register, matrix, VALUES[scheme.values].dtype)
            want_exponents(register, matrix, scheme, f"{matrix.name}.weight_scale")
            return
        if f"{matrix.name}.weight_packed" in self.names:
            self._want_packed(register, matrix, scheme)
        else:
            want_values(register, matrix, VALUES[scheme.values].dtype)
        want_scales(register, matrix, scheme, f"{matrix.name}.weight_scale")
        want_input_scale(register, matrix, scheme)

    def _want_packed(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        rows, columns = matrix.shape
        bits = scheme.bits
        per_word = 32 // bits
        if scheme.zero_points:
            self._want_zeros(register, matrix, scheme)

        def put(words: Callable[[int, int], Tensor], order: Tensor | None = None) -> None:
            for start, stop in row_chunks(matrix.rows, columns * 4):
                values = unpack(words(start, stop), 1, bits)
                values = values[:, slice(*matrix.columns.bounds)] if order is None else values[:, order]
                matrix.put("", signed(values) if bits == 8 else values, start - matrix.rows.start)

        packed, shape = f"{matrix.name}.weight_packed", (rows, cdiv(columns, per_word))
        register.want(f"{matrix.name}.weight_shape", (2,), lambda view: None)
        index = f"{matrix.name}.weight_g_idx"
        if not self.ordered(matrix.name):
            register.want(packed, shape, lambda view: put(lambda start, stop: view.read((start, stop))))
            want_nothing(register, index)
            return
        check_order(matrix)

        def take_both(held: dict[str, Tensor]) -> None:
            assert scheme.group_size is not None
            order = column_order(held[index], scheme.group_size, index)
            matrix.put("order", order)
            put(lambda start, stop: held[packed][start:stop], order)

        want_together(register, {packed: shape, index: (columns,)}, take_both)

    def _want_zeros(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        groups = column_groups(matrix, scheme)

        def take(view: WeightView) -> None:
            zeros = unpack(view.read((0, view.shape[0])), 0)
            matrix.put("zero", zeros[slice(*matrix.rows.bounds), slice(*groups.bounds)])

        register.want(f"{matrix.name}.weight_zero_point", None, take)


def _want_fp4(register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
    name = matrix.name
    want_pairs(register, matrix, f"{name}.weight_packed")
    if scheme.scale_format == "e8m0":
        want_exponents(register, matrix, scheme, f"{name}.weight_scale")
        return
    want_two_scales(register, matrix, scheme, f"{name}.weight_scale", f"{name}.weight_global_scale", divides=True)
    want_nothing(register, f"{name}.input_global_scale")


def _targets(group: Mapping[str, Any], module: str) -> bool:
    for target in group.get("targets", ()):
        if target == "Linear" or target == module:
            return True
        if target.startswith("re:") and re.match(target[3:], module):
            return True
    return False


def _scheme(module: str, in_features: int, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> QuantScheme:
    strategy: Any = weights.get("strategy") or "tensor"
    size = weights.get("group_size")
    kind = (weights["type"], weights["num_bits"])
    symmetric = bool(weights.get("symmetric", True))
    if kind == ("int", 4) and inputs is None:
        groups = in_features if strategy == "channel" else int(size or 0)
        return grouped_int(module, in_features, groups, bits=4, zero_points=not symmetric)
    if kind == ("int", 8) and symmetric and strategy in ("channel", "tensor", "group"):
        if inputs is None:
            return QuantScheme(values="int8", scales=strategy, group_size=size if strategy == "group" else None)
        if inputs.get("dynamic") and inputs.get("num_bits") == 8:
            size = size if strategy == "group" else None
            return QuantScheme(values="int8", scales=strategy, group_size=size, activations="token")
    if kind == ("float", 4) and symmetric and strategy in ("tensor_group", "group"):
        name = "nvfp4" if strategy == "tensor_group" else "mxfp4"
        return grouped_floats(name, module, in_features, int(size or 0))
    if kind == ("float", 8) and symmetric and strategy == "group" and weights.get("scale_dtype") == "torch.uint8":
        return grouped_floats("mxfp8", module, in_features, int(size or 0))
    block = weights.get("block_structure")
    side = int(block[0]) if strategy == "block" and block and len(set(block)) == 1 else None
    if kind == ("float", 8) and symmetric and inputs is None and (side or strategy in ("tensor", "channel")):
        return QuantScheme(values="fp8_e4m3", scales=strategy, group_size=side)
    if kind == ("float", 8) and symmetric and inputs is not None and inputs.get("num_bits") == 8:
        if side:
            return QuantScheme(values="fp8_e4m3", scales="block", group_size=side, activations="group")
        if strategy in ("tensor", "channel"):
            return QuantScheme(
                values="fp8_e4m3", scales=strategy, activations="token" if inputs.get("dynamic") else "static"
            )
    raise Unsupported(
        "compressed-tensors checkpoint",
        [f"{module}: weights {dict(weights)} with input_activations {dict(inputs) if inputs else None}"],
    )
