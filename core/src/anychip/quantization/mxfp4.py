"""GPT-OSS's own container: experts in four-bit floats with a power of two for each 32, everything else plain.

Tensors of a stack `m` of matrices [rows, columns]: m_blocks uint8 [num_experts, rows, groups, 16], m_scales uint8
[num_experts, rows, groups]. Outputs stand before inputs, unlike in the plain checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from anychip.errors import Unsupported
from anychip.plugin_api import QuantScheme, WeightView
from anychip.quantization.format import Container, column_groups
from anychip.quantization.group_floats import check, exponents, grouped_floats, pairs
from anychip.weights.matrix import Matrix, MatrixStack
from anychip.weights.register import WeightRegister

_GROUP = 32


class MXFP4(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}_blocks" not in self.names and f"{module}_scales" not in self.names:
            return None
        return grouped_floats("mxfp4", module, in_features, _GROUP)

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        raise Unsupported("MXFP4 checkpoint", [f"{matrix.name} is one matrix; experts in stacks are read"])

    def want_quantized_stack(self, register: WeightRegister, stack: MatrixStack, scheme: QuantScheme) -> None:
        rows, columns = stack.shape
        groups = column_groups(stack.pieces[0].matrices[0], scheme)
        whole = (stack.count, rows, columns // _GROUP)

        def take_blocks(view: WeightView) -> None:
            check(view, (*whole, _GROUP // 2), torch.uint8)
            for place, expert in enumerate(range(*stack.held.bounds)):
                held = view.read((expert, expert + 1), (0, rows), groups.bounds)[0]
                values = pairs(held.flatten(1))
                for piece in stack.pieces:
                    piece.matrices[place].put("", values[piece.rows])

        def take_scales(view: WeightView) -> None:
            check(view, whole, torch.uint8, torch.float8_e8m0fnu)
            for place, expert in enumerate(range(*stack.held.bounds)):
                held = exponents(view.read((expert, expert + 1), (0, rows), groups.bounds)[0], view.source)
                for piece in stack.pieces:
                    piece.matrices[place].put("scale", held[piece.rows])

        register.want(f"{stack.name}_blocks", None, take_blocks)
        register.want(f"{stack.name}_scales", None, take_scales)
