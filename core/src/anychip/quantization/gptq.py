"""GPTQ's container: 4-bit values packed along the input features, scales and zeros by group.

Tensors of a module: qweight int32 [in_features / 8, out_features], scales [groups, out_features], qzeros int32
[groups, out_features / 8] holding zero - 1 (zero itself in format gptq_v2), g_idx [in_features].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.plugin_api import QuantScheme, WeightView
from anychip.quantization.format import Container, column_groups
from anychip.quantization.packing import unpack
from anychip.weights.matrix import Matrix, row_chunks
from anychip.weights.register import WeightRegister


class GPTQ(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        if config.get("bits") != 4:
            raise Unsupported("GPTQ checkpoint", [f"{config.get('bits')} bits; 4 are supported"])
        self.group_size = int(config["group_size"])
        self.symmetric = bool(config.get("sym", True))
        self.zero_offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.qweight" not in self.names and f"{module}.scales" not in self.names:
            return None
        size = in_features if self.group_size < 0 else self.group_size
        return grouped_int4(module, in_features, size, zero_points=not self.symmetric)

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        rows, columns = matrix.shape
        groups = column_groups(matrix, scheme)
        size = scheme.group_size
        assert size is not None

        def take_values(view: WeightView) -> None:
            first, last = (bound // 8 for bound in matrix.columns.bounds)
            words = view.read((first, last), (0, rows))
            for start, stop in row_chunks(matrix.rows, columns * 4):
                matrix.put("", unpack(words[:, start:stop], 0).T, start - matrix.rows.start)

        def take_scales(view: WeightView) -> None:
            matrix.put("scale", view.read(groups.bounds, matrix.rows.bounds).T.float())

        def take_zeros(view: WeightView) -> None:
            if scheme.zero_points:
                zeros = unpack(view.read(groups.bounds, (0, rows // 8)), 1) + self.zero_offset
                matrix.put("zero", (zeros & 15)[:, slice(*matrix.rows.bounds)].T)

        def take_order(view: WeightView) -> None:
            index = view.read((0, columns))
            if not torch.equal(index.long(), torch.arange(columns) // size):
                raise CheckpointError(
                    f"{view.source} orders columns by activation (desc_act), which is not supported; "
                    "use a checkpoint quantized without it"
                )

        name = matrix.name
        register.want(f"{name}.qweight", (columns // 8, rows), take_values)
        register.want(f"{name}.scales", (columns // size, rows), take_scales)
        register.want(f"{name}.qzeros", (columns // size, rows // 8), take_zeros)
        register.want(f"{name}.g_idx", (columns,), take_order)
        register.optional |= {f"{name}.g_idx"} | (set() if scheme.zero_points else {f"{name}.qzeros"})


def grouped_int4(module: str, in_features: int, size: int, *, zero_points: bool) -> QuantScheme:
    """Raises ConfigError for a group size that does not divide the input features."""
    if size <= 0 or in_features % size or in_features % 8:
        raise ConfigError(f"{module} has {in_features} input features, which groups of {size} do not divide")
    return QuantScheme(values="int4", scales="group", group_size=size, zero_points="int" if zero_points else None)
