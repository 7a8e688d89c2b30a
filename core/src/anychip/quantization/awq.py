"""AWQ's containers: 4-bit values, zeros by group.

Tensors of a module in version gemm, packed along the output features in an interleaved order: qweight int32
[in_features, out_features / 8], scales [groups, out_features], qzeros int32 [groups, out_features / 8]. In version
gemv, packed along the input features in their own order: qweight int32 [out_features, in_features / 8], qzeros int32
[out_features, words], scales [out_features, 8 * words]; words are as many as hold the groups, rounded up to what a warp
reads at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anychip.errors import Unsupported
from anychip.plugin_api import QuantScheme, WeightView
from anychip.quantization.format import Container, column_groups
from anychip.quantization.gptq import grouped_int
from anychip.quantization.packing import from_awq_order, unpack
from anychip.types import cdiv
from anychip.weights.matrix import Matrix, row_chunks
from anychip.weights.register import WeightRegister

_VERSIONS = ("gemm", "gemv")


class AWQ(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        bits = config.get("bits", config.get("w_bit"))
        self.version = str(config.get("version", "gemm")).lower()
        if bits != 4 or self.version not in _VERSIONS:
            raise Unsupported(
                "AWQ checkpoint", [f"{bits} bits, version {self.version}; 4 bits are read, {' and '.join(_VERSIONS)}"]
            )
        self.group_size = int(config.get("group_size", config.get("q_group_size", 128)))
        self.zero_points = bool(config.get("zero_point", True))
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.qweight" not in self.names and f"{module}.scales" not in self.names:
            return None
        size = in_features if self.group_size < 0 else self.group_size
        return grouped_int(module, in_features, size, bits=4, zero_points=self.zero_points)

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        if self.version == "gemv":
            _want_gemv(register, matrix, scheme)
        else:
            _want_gemm(register, matrix, scheme)
        if not scheme.zero_points:
            register.optional.add(f"{matrix.name}.qzeros")


def _want_gemm(register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
    rows, columns = matrix.shape
    groups, size = column_groups(matrix, scheme), scheme.group_size
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


def _want_gemv(register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
    rows, columns = matrix.shape
    groups, size = column_groups(matrix, scheme), scheme.group_size
    assert size is not None
    words = _zero_words(columns, size)

    def take_values(view: WeightView) -> None:
        for start, stop in row_chunks(matrix.rows, columns * 4):
            values = unpack(view.read((start, stop)), 1)[:, slice(*matrix.columns.bounds)]
            matrix.put("", values, start - matrix.rows.start)

    def take_scales(view: WeightView) -> None:
        matrix.put("scale", view.read(matrix.rows.bounds, groups.bounds).float())

    def take_zeros(view: WeightView) -> None:
        if scheme.zero_points:
            matrix.put("zero", unpack(view.read(matrix.rows.bounds), 1)[:, slice(*groups.bounds)])

    register.want(f"{matrix.name}.qweight", (rows, columns // 8), take_values)
    register.want(f"{matrix.name}.scales", (rows, 8 * words), take_scales)
    register.want(f"{matrix.name}.qzeros", (rows, words), take_zeros)


def _zero_words(columns: int, size: int) -> int:
    """Words of zeros to a row: 1, 2 or 4 are read at once, for groups of 128 or more, of 64, of 32 or less."""
    at_once = 1 if size >= 128 else 2 if size >= 64 else 4
    return cdiv(cdiv(columns // size, 8), at_once) * at_once
