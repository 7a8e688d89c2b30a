"""GPTQ's container: values of 4 or 8 bits packed along the input features, scales and zeros by group.

Tensors of a module, n values to a word: qweight int32 [in_features / n, out_features], scales [groups, out_features],
qzeros int32 [groups, out_features / n] holding zero - 1 (zero itself in format gptq_v2), g_idx [in_features]: the group
of each input. With desc_act the groups hold columns in the order of their activations' size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.plugin_api import QuantScheme, WeightView
from anychip.quantization.format import Container, column_groups
from anychip.quantization.packing import unpack
from anychip.quantization.stored import want_together
from anychip.weights.matrix import Matrix, row_chunks
from anychip.weights.register import WeightRegister

INT8_OFFSET = 128
"""Of eight bits, what is taken off values that are stored from zero on."""


class GPTQ(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        self.bits = int(config["bits"])
        if self.bits not in (4, 8):
            raise Unsupported("GPTQ checkpoint", [f"{self.bits} bits; 4 and 8 are read"])
        self.group_size = int(config["group_size"])
        self.symmetric = bool(config.get("sym", True))
        self.by_activation = bool(config.get("desc_act", False))
        self.zero_offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.qweight" not in self.names and f"{module}.scales" not in self.names:
            return None
        size = in_features if self.group_size < 0 else self.group_size
        return grouped_int(module, in_features, size, bits=self.bits, zero_points=not self.symmetric)

    def ordered(self, module: str) -> bool:
        return self.by_activation and self.group_size > 0 and f"{module}.g_idx" in self.names

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        name, (rows, columns), size = matrix.name, matrix.shape, scheme.group_size
        assert size is not None
        per_word = 32 // scheme.bits
        index, words = f"{name}.g_idx", f"{name}.qweight"
        if self.ordered(name):
            check_order(matrix)

            def take_both(held: dict[str, Tensor]) -> None:
                order = column_order(held[index], size, index)
                matrix.put("order", order)
                self._put_values(matrix, held[words], order)

            want_together(register, {words: (columns // per_word, rows), index: (columns,)}, take_both)
        else:

            def take_values(view: WeightView) -> None:
                first, last = (bound // per_word for bound in matrix.columns.bounds)
                self._put_values(matrix, view.read((first, last), (0, rows)))

            register.want(words, (columns // per_word, rows), take_values)
            register.want(index, (columns,), lambda view: _check_index(view, size))
            register.optional.add(index)
        self._want_scales(register, matrix, scheme)

    def _put_values(self, matrix: Matrix, words: Tensor, order: Tensor | None = None) -> None:
        """`words` are those of this rank's columns."""
        for start, stop in row_chunks(matrix.rows, matrix.shape[1] * 4):
            values = unpack(words[:, start:stop], 0, self.bits).T
            if self.bits == 8:
                values = signed(values)
            matrix.put("", values if order is None else values[:, order], start - matrix.rows.start)

    def _want_scales(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        name, (rows, columns), size = matrix.name, matrix.shape, scheme.group_size
        assert size is not None
        groups, per_word, most = column_groups(matrix, scheme), 32 // scheme.bits, (1 << scheme.bits) - 1

        def take_scales(view: WeightView) -> None:
            matrix.put("scale", view.read(groups.bounds, matrix.rows.bounds).T.float())

        def take_zeros(view: WeightView) -> None:
            if scheme.zero_points is None:
                return
            zeros = unpack(view.read(groups.bounds, (0, rows // per_word)), 1, scheme.bits)
            # The container wraps: a zero of 0 is held as the greatest number.
            zeros = ((zeros.int() + self.zero_offset) & most)[:, slice(*matrix.rows.bounds)].T
            matrix.put("zero", zeros.float() - INT8_OFFSET if scheme.zero_points == "float" else zeros.to(torch.uint8))

        register.want(f"{name}.scales", (columns // size, rows), take_scales)
        register.want(f"{name}.qzeros", (columns // size, rows // per_word), take_zeros)
        if scheme.zero_points is None:
            register.optional.add(f"{name}.qzeros")


def signed(values: Tensor) -> Tensor:
    """int8 of uint8 values that are stored from zero on."""
    return (values.short() - INT8_OFFSET).char()


def _check_index(view: WeightView, size: int) -> None:
    index = view.read((0, view.shape[0]))
    if not torch.equal(index.long(), torch.arange(len(index)) // size):
        raise CheckpointError(
            f"{view.source} orders columns by activation, and quantization_config does not say so (desc_act); set it, "
            "or use a checkpoint quantized without it"
        )


def check_order(matrix: Matrix) -> None:
    """Raises Unsupported where a matrix whose columns are ordered by activation cannot be held."""
    if not matrix.takes_order:
        raise Unsupported(
            f"{matrix.name} with columns ordered by activation (desc_act, actorder)",
            ["projections of decoders are read so, experts and heads are not: each would need an order of its own"],
        )
    if matrix.columns.count != matrix.shape[1]:
        raise ConfigError(
            f"{matrix.name} has columns ordered by activation, so that a rank's {matrix.columns.count} columns of "
            f"{matrix.shape[1]} would hold parts of every group; set tensor_parallel_size 1, or use a checkpoint "
            "quantized without desc_act"
        )


def column_order(index: Tensor, size: int, name: str) -> Tensor:
    """Which input each column meets, int64 [in_features], of the groups of the inputs. Raises CheckpointError unless
    every group has `size` of them."""
    index = index.long()
    counts = torch.bincount(index.clamp(min=0), minlength=len(index) // size)
    if bool((index < 0).any()) or not bool((counts == size).all()):
        raise CheckpointError(
            f"{name} puts {int(counts.min())} to {int(counts.max())} of {len(index)} columns into a group, and "
            f"quantization_config says {size}"
        )
    return index.argsort(stable=True)


def grouped_int(module: str, in_features: int, size: int, *, bits: int, zero_points: bool) -> QuantScheme:
    """Values of 4 or 8 bits. Raises ConfigError for a group size that does not divide the input features."""
    if size <= 0 or in_features % size or in_features % 8:
        raise ConfigError(f"{module} has {in_features} input features, which groups of {size} do not divide")
    if bits == 8:
        return QuantScheme(values="int8", scales="group", group_size=size, zero_points="float" if zero_points else None)
    return QuantScheme(values="int4", scales="group", group_size=size, zero_points="int" if zero_points else None)
