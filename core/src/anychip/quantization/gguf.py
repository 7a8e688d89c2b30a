"""GGUF's container: each matrix in a block type of its own, named by the tensor's end (weights/gguf_checkpoint.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anychip.errors import CheckpointError
from anychip.gguf.block_types import BY_NAME, BlockType
from anychip.plugin_api import QuantScheme, WeightView
from anychip.quantization.format import Container, QuantizeAtLoad, WeightFormat, column_groups
from anychip.quantization.ggml_schemes import AT_LOAD, parts_of, scheme_of_all
from anychip.quantization.group_floats import check, exponents
from anychip.weights.matrix import Matrix, MatrixStack, row_chunks
from anychip.weights.register import WeightRegister

_ENDS = {name.lower(): stored for name, stored in BY_NAME.items() if not stored.is_plain}
_UNUSED = tuple(f".{end}" for end in _ENDS)
"""Ends of blocks that a layer takes as floats."""
_EXPERT = re.compile(r"(.+\.experts)\.(?:\d+\.\w+|gate_up_proj|down_proj)")


class GGUF(Container):
    """The experts of a layer are one product, and have one scheme."""

    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        super().__init__(names)
        self._config = config
        self._types: dict[str, str] = {}
        for name in names:
            module, _, end = name.rpartition(".")
            if end in _ENDS:
                self._types[module] = _ENDS[end].name
        self._experts: dict[str, set[str | None]] = {}
        for name in names:
            module, _, end = name.rpartition(".")
            if end == "weight" and (match := _EXPERT.fullmatch(module)):
                self._experts.setdefault(match[1], set()).add(self._types.get(module))

    def for_head(self) -> WeightFormat:
        return _Head(self._config, self.names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if match := _EXPERT.fullmatch(module):
            return scheme_of_all(self._experts.get(match[1], {None}))
        return scheme_of_all({self._types.get(module)})

    def want(self, register: WeightRegister, matrix: Matrix) -> None:
        if _UNUSED[0] not in register.ignored:
            register.ignored += _UNUSED
        super().want(register, matrix)

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        if scheme == AT_LOAD:
            QuantizeAtLoad("int8").want(register, matrix)
            return
        stored = BY_NAME[self._types[matrix.name]]
        _want_blocks(register, matrix, scheme, stored)
        self._leave_floats(register, f"{matrix.name}.weight")

    def want_stack(self, register: WeightRegister, stack: MatrixStack) -> None:
        """Files hold gate, up and down apart, and a matrix of each expert as a checkpoint of single experts would."""
        for piece in stack.pieces:
            for matrix in piece.matrices:
                self.want(register, matrix)

    @staticmethod
    def _leave_floats(register: WeightRegister, name: str) -> None:
        """The same tensor as floats, which a tied embedding may want."""
        if name not in register.slots:
            register.want(name, None, lambda view: None)
            register.optional.add(name)


class _Head(GGUF):
    """Of a file that ties the head, the embedding's blocks are it; the embedding itself is kept as floats."""

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        own = "lm_head" if "lm_head.weight" in self.names else "model.embed_tokens"
        return super().scheme(own, in_features)


def _want_blocks(register: WeightRegister, matrix: Matrix, scheme: QuantScheme, stored: BlockType) -> None:
    rows, columns = matrix.shape
    groups = {"": matrix.columns, **dict.fromkeys(("scale", "minimum"), column_groups(matrix, scheme))}
    if scheme.super_group_size:
        groups |= dict.fromkeys(
            ("super_scale", "super_minimum"), column_groups(matrix, scheme, scheme.super_group_size)
        )

    def take(view: WeightView) -> None:
        check(view, (rows, columns // stored.size * stored.nbytes), torch.uint8)
        held: dict[str, list[Tensor]] = {}
        for start, stop in row_chunks(matrix.rows, columns):
            parts = parts_of(stored, view.read((start, stop)), scheme)
            mine = {kind: part[:, slice(*groups[kind].bounds)] for kind, part in parts.items()}
            matrix.put("", mine.pop(""), start - matrix.rows.start)
            for kind, part in mine.items():
                held.setdefault(kind, []).append(part)
        for kind, pieces in held.items():
            matrix.put(kind, _numbers(torch.cat(pieces), view.source))

    register.want(f"{matrix.name}.{stored.name.lower()}", None, take)


def _numbers(parts: Tensor, source: str) -> Tensor:
    """Raises CheckpointError for scales that are no numbers."""
    if parts.dtype == torch.uint8:
        return exponents(parts, source)
    if parts.is_floating_point() and not bool(parts.isfinite().all()):
        raise CheckpointError(f"{source} holds a scale that is not a finite number; download the file again")
    return parts
