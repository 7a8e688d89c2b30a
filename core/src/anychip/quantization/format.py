"""The protocol of a weight format, and the two that read plain matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.ops.reference.quantized import quantize_rows
from anychip.plugin_api import NAMED, QuantScheme, WeightView
from anychip.weights.matrix import Matrix, MatrixStack, Span, stream
from anychip.weights.register import WeightRegister


class WeightFormat(Protocol):
    """How a checkpoint stores the matrices of its products."""

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        """A module's scheme; None for a plain one. Raises ConfigError where it cannot be."""
        ...

    def want(self, register: WeightRegister, matrix: Matrix) -> None:
        """Asks for the matrix's tensors, and puts what they hold into its kernel in canonical form."""
        ...

    def want_stack(self, register: WeightRegister, stack: MatrixStack) -> None:
        """Asks for the tensors in which experts are stacked, likewise."""
        ...

    def ordered(self, module: str) -> bool:
        """Whether a module's columns come in an order of their own. Its kernel then also gets kind "order", int64
        [in_features]: which input each column meets."""
        ...

    def for_router(self) -> WeightFormat:
        """The format of matrices that pick experts: small, and a wrong pick costs more than a rounded product."""
        ...

    def for_head(self) -> WeightFormat:
        """The format of the output head: often most of what a small model reads for a token, and what decides it."""
        ...


class PlainFormat:
    """One tensor, `weight`, of any floating dtype."""

    def for_router(self) -> WeightFormat:
        return self

    def for_head(self) -> WeightFormat:
        return self

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        return None

    def ordered(self, module: str) -> bool:
        return False

    def want(self, register: WeightRegister, matrix: Matrix) -> None:
        def take(view: WeightView) -> None:
            if not view.dtype.is_floating_point or view.dtype.itemsize == 1:
                raise CheckpointError(
                    f"{view.source} is stored as {str(view.dtype).removeprefix('torch.')}, and nothing says "
                    "how to read that: its scale is missing, or config.json has no quantization_config"
                )
            stream(view, matrix.rows, matrix.columns, lambda chunk, row: matrix.put("", chunk, row))

        register.want(f"{matrix.name}.weight", matrix.shape, take)

    def want_stack(self, register: WeightRegister, stack: MatrixStack) -> None:
        want_plain_stack(register, stack)


GROUP_SIZES = (128, 64, 32)
"""For int4 at load: the largest of these that divides the input features."""

AT_LOAD = ("int8", "int4", "fp8", "mxfp4")
"""What plain matrices are quantized to as they load."""


class QuantizeAtLoad:
    """Plain matrices, quantized as they stream, symmetrically: int8 or fp8 by channel, int4 or mxfp4 by group. The head
    is int8 under each of them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def for_router(self) -> WeightFormat:
        return PlainFormat()

    def for_head(self) -> WeightFormat:
        return QuantizeAtLoad("int8")

    def ordered(self, module: str) -> bool:
        return False

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        named = NAMED[self.name]
        if named.group_size is None:
            return named
        sizes = GROUP_SIZES if self.name == "int4" else (named.group_size,)
        size = next((size for size in sizes if in_features % size == 0), None)
        if size is None:
            raise ConfigError(
                f"--quantization {self.name} groups {', '.join(map(str, sizes))} columns, and none divides the "
                f"{in_features} input features of {module}; use int8 or fp8"
            )
        return replace(named, group_size=size)

    def want(self, register: WeightRegister, matrix: Matrix) -> None:
        scheme = matrix.scheme
        if scheme is None:
            return PlainFormat().want(register, matrix)
        columns = matrix.columns
        scale_columns = column_groups(matrix, scheme)
        scales: list[Tensor] = []

        def take(view: WeightView) -> None:
            # Whole rows, so that every rank finds the same scales.
            stream(view, matrix.rows, Span(0, matrix.shape[1]), give)

        def give(chunk: Tensor, row: int) -> None:
            values, scale = quantize_rows(chunk, scheme)
            matrix.put("", values[:, slice(*columns.bounds)], row)
            scales.append(scale[:, slice(*scale_columns.bounds)] if scale.dim() > 1 else scale)
            if row + len(chunk) == matrix.rows.count:
                matrix.put("scale", torch.cat(scales))
                scales.clear()

        register.want(f"{matrix.name}.weight", matrix.shape, take)
        return None

    def want_stack(self, register: WeightRegister, stack: MatrixStack) -> None:
        want_plain_stack(register, stack)


class Container(ABC):
    """What containers of quantized checkpoints share: tensors' names say which modules are quantized."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.plain = PlainFormat()

    def for_router(self) -> WeightFormat:
        return self

    def for_head(self) -> WeightFormat:
        return self

    def want(self, register: WeightRegister, matrix: Matrix) -> None:
        if matrix.scheme is None:
            self.plain.want(register, matrix)
        else:
            self.want_quantized(register, matrix, matrix.scheme)

    def want_stack(self, register: WeightRegister, stack: MatrixStack) -> None:
        if stack.scheme is None:
            self.plain.want_stack(register, stack)
        else:
            self.want_quantized_stack(register, stack, stack.scheme)

    def ordered(self, module: str) -> bool:
        return False

    @abstractmethod
    def scheme(self, module: str, in_features: int) -> QuantScheme | None: ...

    @abstractmethod
    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        """Asks for the tensors of a matrix that the container holds in a scheme."""

    def want_quantized_stack(self, register: WeightRegister, stack: MatrixStack, scheme: QuantScheme) -> None:
        """Asks for the tensors of stacked experts that the container holds in a scheme. Raises Unsupported where it
        has none such."""
        raise Unsupported(type(self).__name__, [f"{stack.name} stacks experts in {scheme.name}"])


def want_plain_stack(register: WeightRegister, stack: MatrixStack) -> None:
    """Tensor `name` [count, inputs, outputs], plain: inputs before outputs, unlike a linear layer's, but where the
    stack says otherwise. Quantized at load where the matrices have a scheme."""

    def take(view: WeightView) -> None:
        for place, expert in enumerate(range(*stack.held.bounds)):
            matrix = view.read((expert, expert + 1))[0]
            rows = matrix if stack.outputs_first else matrix.T
            for piece in stack.pieces:
                put_rows(piece.matrices[place], rows[piece.rows])

    shape = stack.shape if stack.outputs_first else reversed(stack.shape)
    register.want(stack.name, (stack.count, *shape), take)


def put_rows(matrix: Matrix, rows: Tensor) -> None:
    """Puts a rank's rows, whole and plain: its columns of them, quantized at load where the matrix has a scheme."""
    scheme, columns = matrix.scheme, slice(*matrix.columns.bounds)
    if scheme is None:
        matrix.put("", rows[:, columns])
        return
    values, scale = quantize_rows(rows, scheme)
    matrix.put("", values[:, columns])
    matrix.put("scale", scale if scale.dim() == 1 else scale[:, slice(*column_groups(matrix, scheme).bounds)])


def column_groups(matrix: Matrix, scheme: QuantScheme, size: int | None = None) -> Span:
    """The groups that this rank's columns cover, of the scheme's size unless another is given. Raises ConfigError where
    its share ends within a group."""
    size, columns = size or scheme.group_size, matrix.columns
    if size is None:
        return Span(0, 1)
    whole = columns.start == 0 and columns.count == matrix.shape[1]
    if not whole and (columns.start % size or columns.count % size):
        raise ConfigError(
            f"{matrix.name} is quantized in groups of {size} columns, which {columns.count} columns a rank cut; "
            "choose another tensor_parallel_size"
        )
    return Span(columns.start // size, -(-columns.count // size))
