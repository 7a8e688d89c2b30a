"""AWQ's container: 4-bit values packed along the output features in an interleaved order, zeros by group.

Tensors of a module: qweight int32 [in_features, out_features / 8], scales [groups, out_features], qzeros int32
[groups, out_features / 8].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anychip.errors import Unsupported
from anychip.plugin_api import QuantScheme, WeightView
from anychip.quantization.format import Container, column_groups
from anychip.quantization.gptq import grouped_int4
from anychip.quantization.packing import from_awq_order, unpack
from anychip.weights.matrix import Matrix, row_chunks
from anychip.weights.register import WeightRegister


class AWQ(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        bits = config.get("bits", config.get("w_bit"))
        if bits != 4 or config.get("version", "gemm") != "gemm":
            raise Unsupported("AWQ checkpoint", [f"{bits} bits, version {config.get('version')}; 4-bit gemm is read"])
        self.group_size = int(config.get("group_size", config.get("q_group_size", 128)))
        self.zero_points = bool(config.get("zero_point", True))
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.qweight" not in self.names and f"{module}.scales" not in self.names:
            return None
        return grouped_int4(module, in_features, self.group_size, zero_points=self.zero_points)

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        rows, columns = matrix.shape
        groups = column_groups(matrix, scheme)
        size = scheme.group_size
        assert size is not None

        def take_values(view: WeightView) -> None:
            words = view.read(matrix.columns.bounds, (0, rows // 8))
            for start, stop in row_chunks(matrix.rows, columns * 4):
                # Whole words: a share may begin within one.
                first = start // 8
                values = from_awq_order(unpack(words[:, first : -(-stop // 8)], 1))
                matrix.put("", values[:, start - 8 * first : stop - 8 * first].T, start - matrix.rows.start)

        def take_scales(view: WeightView) -> None:
            matrix.put("scale", view.read(groups.bounds, matrix.rows.bounds).T.float())

        def take_zeros(view: WeightView) -> None:
            if scheme.zero_points:
                zeros = from_awq_order(unpack(view.read(groups.bounds, (0, rows // 8)), 1))
                matrix.put("zero", zeros[:, slice(*matrix.rows.bounds)].T)

        register.want(f"{matrix.name}.qweight", (columns, rows // 8), take_values)
        register.want(f"{matrix.name}.scales", (columns // size, rows), take_scales)
        register.want(f"{matrix.name}.qzeros", (columns // size, rows // 8), take_zeros)
        if not scheme.zero_points:
            register.optional.add(f"{matrix.name}.qzeros")
