"""bitsandbytes' containers: NF4 and FP4, and the eight bits of LLM.int8.

Tensors of a module of four bits: weight uint8 [numbers / 2, 1], the matrix's rows behind one another, the first of two
numbers in the high half; weight.absmax, a float32 scale for each block; weight.quant_map float32 [16];
weight.quant_state.bitsandbytes__nf4 (or fp4), JSON as bytes. With double quantization absmax is uint8, and
weight.nested_quant_map [256] and weight.nested_absmax say what it stands for. Of eight bits: weight int8 [out_features,
in_features], SCB float32 [out_features], 127 times the scales, and weight_format [], 0 for rows as they are. Sources:
Dettmers et al., "QLoRA", 2023; Dettmers et al., "LLM.int8()", 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

import msgspec
import torch
from torch import Tensor

from anychip.errors import CheckpointError, Unsupported
from anychip.plugin_api import NAMED, QuantScheme, WeightView
from anychip.quantization.format import Container
from anychip.quantization.stored import put_grouped, want_together, want_values
from anychip.weights.matrix import Matrix
from anychip.weights.register import WeightRegister

_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(x / 12 for x in (*_TWELFTHS, *(-x for x in _TWELFTHS)))
"""bitsandbytes' own four-bit float, not e2m1: a sign bit, and eight magnitudes of greatest one."""
_NF4 = NAMED["codebook4"]
_INT8 = NAMED["int8"]
_INT8_MAX = 127
_STATE = "weight.quant_state.bitsandbytes__"


class BitsAndBytes(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        self.block_size = int(config.get("bnb_4bit_blocksize") or 64)
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.SCB" in self.names:
            return _INT8
        numbers = {kind: f"{module}.{_STATE}{kind}" in self.names for kind in ("nf4", "fp4")}
        if not any(numbers.values()):
            return None
        # Blocks run over the ends of rows: what all of them have in common with rows is a group.
        size = gcd(in_features, self.block_size)
        if size % 2:
            raise Unsupported(
                f"{module} in blocks of {self.block_size}", [f"its {in_features} columns share no even group with them"]
            )
        return replace(_NF4, group_size=size, codebook=_NF4.codebook if numbers["nf4"] else FP4)

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        if scheme == _INT8:
            _want_int8(register, matrix)
        else:
            self._want_blocks(register, matrix, scheme)

    def _want_blocks(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        name, size = matrix.name, scheme.group_size
        rows, columns = matrix.shape
        assert size is not None
        kind = "fp4" if scheme.codebook == FP4 else "nf4"
        names = ["weight", "weight.absmax", "weight.quant_map", f"{_STATE}{kind}"]
        if f"{name}.weight.nested_absmax" in self.names:
            names += ["weight.nested_absmax", "weight.nested_quant_map"]

        def take(held: dict[str, Tensor]) -> None:
            parts = {each: held[f"{name}.{each}"] for each in names}
            state = _state(parts[f"{_STATE}{kind}"], name)
            if state.blocksize != self.block_size or tuple(state.shape) != matrix.shape:
                raise CheckpointError(
                    f"{name}.weight is {list(state.shape)} in blocks of {state.blocksize}, the model wants "
                    f"{list(matrix.shape)} in blocks of {self.block_size}"
                )
            if not torch.equal(parts["weight.quant_map"].float(), torch.tensor(scheme.codebook)):
                raise CheckpointError(f"{name}.weight.quant_map holds other numbers than those of {kind}")
            packed = parts["weight"].view(torch.uint8).flatten()
            if packed.numel() * 2 != rows * columns:
                raise CheckpointError(f"{name}.weight has {packed.numel()} bytes for {rows} x {columns} numbers")
            values = torch.stack((packed >> 4, packed & 15), dim=-1).view(rows, columns)
            scales = _scales(parts, state).repeat_interleave(self.block_size // size)[: rows * columns // size]
            put_grouped(matrix, scheme, values, scales.view(rows, columns // size))

        want_together(register, {f"{name}.{each}": None for each in names}, take)


class _State(msgspec.Struct):
    """What is needed of quant_state."""

    shape: list[int]
    blocksize: int = 64
    nested_blocksize: int = 256
    nested_offset: float = 0.0


def _state(held: Tensor, name: str) -> _State:
    try:
        return msgspec.json.decode(bytes(held.tolist()), type=_State)
    except (msgspec.DecodeError, ValueError) as error:
        raise CheckpointError(f"{name}.{_STATE}...: cannot be read: {error}") from error


def _scales(parts: Mapping[str, Tensor], state: _State) -> Tensor:
    """float32 [blocks], in the order of roundings that the package has."""
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" not in parts:
        return absmax.float()
    upper = parts["weight.nested_absmax"].float().repeat_interleave(state.nested_blocksize)[: len(absmax)]
    return parts["weight.nested_quant_map"].float()[absmax.long()] * upper + state.nested_offset


def _want_int8(register: WeightRegister, matrix: Matrix) -> None:
    def take_scales(view: WeightView) -> None:
        matrix.put("scale", view.read(matrix.rows.bounds).float() / _INT8_MAX)

    def take_layout(view: WeightView) -> None:
        layout = int(view.read().flatten()[0])
        if layout != 0:
            raise Unsupported(
                f"{view.source}", [f"weights in layout {layout} of a GPU; save them with rows as they are"]
            )

    want_values(register, matrix, "int8")
    register.want(f"{matrix.name}.SCB", (matrix.shape[0],), take_scales)
    register.want(f"{matrix.name}.weight_format", None, take_layout)
    register.optional.add(f"{matrix.name}.weight_format")
